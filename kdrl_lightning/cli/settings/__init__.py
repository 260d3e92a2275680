"""Changes how jsonargparse reads settings: strings stay strings, and errors name their cause."""
