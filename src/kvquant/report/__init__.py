"""Tables and figures from what runs measured."""
