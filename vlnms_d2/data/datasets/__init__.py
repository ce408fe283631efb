"""The data sets that the plugin reads, one file for each format."""
