"""What the tests share: a real store, a scripted backend, a client of the session protocol."""
