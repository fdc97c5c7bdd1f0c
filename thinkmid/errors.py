"""What the user got wrong, as opposed to what we got wrong."""


class UserError(ValueError):
    """A mistake in a config, a file or a row. One line that names it; programs print that line and exit with code 2."""
