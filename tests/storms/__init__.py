"""Long runs of many real processes that are killed and stopped at random; the short form of each is a test of the suite."""
