"""The inference methods that come with pgen, each registered as any plugin is."""
