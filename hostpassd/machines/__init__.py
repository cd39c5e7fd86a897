"""Who holds it: virtual machines and the devices they claim."""
