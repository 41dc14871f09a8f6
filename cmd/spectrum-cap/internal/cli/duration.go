package cli

import (
	"strconv"
	"strings"
	"time"
)

// parseDuration reads "90s", "1h30m" or "7d".
func parseDuration(flag, s string) (time.Duration, error) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		if n, err := strconv.ParseUint(days, 10, 16); err == nil {
			return time.Duration(n) * 24 * time.Hour, nil
		}
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, usage(`%s %s: a duration is written as "90s", "1h30m" or "7d"`, flag, s)
	}
	return d, nil
}

// parseTime reads a point of time: RFC 3339, a local date with or without a
// time of day, or how long ago it was.
func (a *app) parseTime(flag, s string) (*time.Time, error) {
	if s == "" {
		return nil, nil //nolint:nilnil // not given
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02 15:04:05", "2006-01-02 15:04", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return &t, nil
		}
	}
	d, err := parseDuration(flag, s)
	if err != nil {
		return nil, usage(`%s %s: a time is written as "2h" (ago), "2006-01-02 15:04" or in RFC 3339`, flag, s)
	}
	t := a.now().Add(-d)
	return &t, nil
}
