package spectrum.lib.clock_test

import data.spectrum.lib.clock

test_between_start_is_inside if clock.between("2026-03-02T09:00:00+01:00", "09:00", "17:30")

test_between_end_is_outside if not clock.between("2026-03-02T17:30:00+01:00", "09:00", "17:30")

test_between_is_local_time if clock.between("2026-03-02T09:30:00+05:30", "09:00", "10:00")

test_between_over_midnight_late if clock.between("2026-03-02T23:15:00Z", "22:00", "06:00")

test_between_over_midnight_early if clock.between("2026-03-02T05:59:59Z", "22:00", "06:00")

test_not_between_over_midnight if not clock.between("2026-03-02T12:00:00Z", "22:00", "06:00")

test_weekend if clock.weekend("2026-03-01T23:30:00-08:00")

test_not_weekend if not clock.weekend("2026-03-02T00:30:00+13:00")
