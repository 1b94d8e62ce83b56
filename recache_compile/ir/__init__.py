"""What is known about programs: facts, schedules, forecasters, plans, costs, and their text form."""
