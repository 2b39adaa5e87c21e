"""``densesteer chat``: a conversation in a terminal, or line by line in a pipe.

``loop`` reads and dispatches, ``actions`` are the commands of the table in ``commands``.
What is asked several times at once goes through ``rows``. A ``screen`` shows, a ``keyboard``
reads; both have a plain form, and one for terminals that needs the extra ``chat``
(``terminal_screen``, ``terminal_keyboard``).
"""
