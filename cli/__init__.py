"""The command line of lorazip; everything else is in `lorazip_core`."""
