"""What `serve` serves: the tracking API that Segment's server libraries speak."""
