"""How the command line reads settings: text stays text, and a mistake is named by its cause."""
