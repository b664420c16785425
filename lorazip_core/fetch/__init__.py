"""``fetch``: whole collections of adapters, from the Hub and from local directories, pinned by a lock."""
