"""The parts of a report's page: each function returns the HTML of one section, or nothing where there is nothing."""
