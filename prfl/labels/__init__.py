"""Labels by people: videos drawn for comparison, the page on which a person compares them, labels from a CSV."""
