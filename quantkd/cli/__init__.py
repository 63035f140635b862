"""The command line: one file per subcommand, which parses its options and calls the library."""
