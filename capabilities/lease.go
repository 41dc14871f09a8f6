package capabilities

import (
	"math"
	"time"
)

// Instant is one reading of the machine's clocks.
type Instant struct {
	// Wall is CLOCK_REALTIME. It can be set back.
	Wall time.Time
	// BootID names the boot that Boot counts from
	// (/proc/sys/kernel/random/boot_id).
	BootID string
	// Boot is CLOCK_BOOTTIME: it runs during suspend and is never set, and
	// means nothing after the next boot.
	Boot time.Duration
}

// Deadline is the end of a lease on two clocks, of which the earlier wins.
// Wall time alone could be set back; boot time alone does not survive a
// reboot. The zero value means no end.
type Deadline struct {
	Wall   time.Time     `json:"wall,omitzero"`
	BootID string        `json:"boot_id,omitzero"`
	Boot   time.Duration `json:"boot_ns,omitzero"`
}

// NewDeadline is ttl after now. A ttl that is not positive is over at once.
func NewDeadline(now Instant, ttl time.Duration) Deadline {
	ttl = max(ttl, 0)
	// Go's own monotonic reading stops during suspend, so it is stripped.
	d := Deadline{Wall: now.Wall.Round(0).UTC().Add(ttl), BootID: now.BootID, Boot: now.Boot + ttl}
	if d.Boot < now.Boot {
		d.Boot = math.MaxInt64
	}
	return d
}

// IsZero tells whether there is no end.
func (d Deadline) IsZero() bool { return d.Wall.IsZero() && d.BootID == "" && d.Boot == 0 }

// Equal tells whether two deadlines are the same on both clocks.
func (d Deadline) Equal(e Deadline) bool {
	return d.Wall.Equal(e.Wall) && d.BootID == e.BootID && d.Boot == e.Boot
}

// Passed tells whether the lease is over: at the deadline it is.
func (d Deadline) Passed(now Instant) bool { return d.Remaining(now) == 0 }

// Remaining is how long the lease still runs, never negative, and the longest
// Duration where there is no end.
func (d Deadline) Remaining(now Instant) time.Duration {
	if d.IsZero() {
		return math.MaxInt64
	}
	left := d.Wall.Round(0).Sub(now.Wall.Round(0))
	if d.BootID != "" && d.BootID == now.BootID {
		left = min(left, d.Boot-now.Boot)
	}
	return max(left, 0)
}

// Earliest is the deadline, measured now, that is over when the first of all
// is. It is zero where none of them has an end.
func Earliest(now Instant, all ...Deadline) Deadline {
	left := time.Duration(math.MaxInt64)
	bounded := false
	for _, d := range all {
		if !d.IsZero() {
			bounded = true
			left = min(left, d.Remaining(now))
		}
	}
	if !bounded {
		return Deadline{}
	}
	return NewDeadline(now, left)
}
