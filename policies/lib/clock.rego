# Predicates about the time of a request, on the host's clock and in its time
# zone, as input.now carries them.
#
#     import data.spectrum.lib.clock
#
#     deny contains "only in office hours" if not clock.between(input.now, "09:00", "17:30")
package spectrum.lib.clock

# between(now, from, to): the wall clock shows from or later, and earlier than
# to. Both are "HH:MM". A span over midnight, "22:00" to "06:00", works.
between(now, from, to) if {
	from <= to
	_hhmm(now) >= from
	_hhmm(now) < to
}

between(now, from, to) if {
	from > to
	_hhmm(now) >= from
}

between(now, from, to) if {
	from > to
	_hhmm(now) < to
}

# weekend(now): it is Saturday or Sunday where the host is.
weekend(now) if _weekday(now) in {"Saturday", "Sunday"}

# RFC 3339 shows the local time of day at a fixed place.
_hhmm(now) := substring(now, 11, 5)

# Read as UTC, the local date is that of the host's wall.
_weekday(now) := time.weekday(time.parse_rfc3339_ns(concat("", [substring(now, 0, 10), "T00:00:00Z"])))
