"""Session Gateway: durable, shared, stoppable chats in front of an unmodified AI SDK backend."""
