"""The command line: one file a verb, shared arguments in ``args``. May import everything; nothing imports it."""
