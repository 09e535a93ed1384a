"""The two memories: rows on the device (K, resident V), rows in host RAM (offloaded V), and the link between them."""
