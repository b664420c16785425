"""What people and CI systems read of a result: pages that open offline, JUnit XML, a Markdown summary."""
