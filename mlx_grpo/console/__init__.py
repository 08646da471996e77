"""All that is shown. The only room that prints."""
