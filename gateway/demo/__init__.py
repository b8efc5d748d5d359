"""A backend to try the gateway with, and a page to see it in.

The backend speaks what an AI SDK backend speaks and knows nothing of the gateway. The page (``page.html``)
speaks the session protocol; ``device.js`` is its client, and doubles as the shortest example of one.
"""
