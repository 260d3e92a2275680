"""Drivers that tests start on one rank or several, and what starts them."""
