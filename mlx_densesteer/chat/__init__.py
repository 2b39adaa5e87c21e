"""``densesteer chat``: a conversation in a terminal, or line by line in a pipe.

- ``loop``: ``Chat`` reads a line, then answers it or carries out its command.
- ``commands``: the table of commands.
- ``rows``: one question under several steerings, for ``/compare``, ``/sweep`` and ``/stats``.
- ``status``: the settings in force, and tables that compare answers.
- ``plain``: the screen and the keyboard of a pipe.
- ``terminal_screen`` (rich) and ``terminal_keyboard`` (prompt_toolkit): those of a terminal. They need
  the extra ``chat``.
"""
