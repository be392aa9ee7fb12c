"""Private API of Dynamo and Inductor, and capturing a call."""
