"""Tables and pure functions over devices: what they are called, what sort they are, what blocks them."""
