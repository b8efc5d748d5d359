"""A backend to try the gateway with, and a page to see it in.

The backend speaks what an AI SDK backend speaks and knows nothing of the gateway. The page (``page.html``)
shows two devices. Each is a ``GatewayConnection`` of the client that the gateway itself serves (``client/``),
on a network that can be broken (``network.js``).
"""
