package ledger

import (
	"time"

	"spectrum-os.org/broker/capabilities"
)

// anchor ties this boot's time to the wall time that counted when it was
// recorded: that of the first mark of the boot, and never of an earlier one.
// From then on boot time tells how late it is at least, whatever the wall clock
// says, and for how long no broker ran.
type anchor struct {
	set        bool
	wall, boot int64
}

// NewMark is the clock.highwater event that a broker records when it starts, and
// while there are leases. now is the ledger's own, [Tx.Now].
func NewMark(actor Actor, now capabilities.Instant) Event {
	return Event{Type: ClockHighwater, Actor: actor, Data: mustJSON(HighwaterData{Wall: now.Wall, BootID: now.BootID, Boot: now.Boot})}
}

// mark takes in an anchor of the present boot.
func (l *layer) mark(d HighwaterData) {
	due := l.committed().due
	if !l.meta.anchor.set && due != nil && d.BootID != "" && d.BootID == due.bootID && d.Boot >= 0 {
		l.meta.anchor = anchor{true, d.Wall.UnixNano(), int64(d.Boot)}
	}
}

// atLeast is how late it is by this boot's time.
func (a anchor) atLeast(boot time.Duration) time.Time {
	if !a.set {
		return time.Time{}
	}
	return nanoTime(a.wall).Add(boot - nanoDuration(a.boot))
}

// InThisBoot is a deadline as who sees only the machine's clocks must be told
// it: one of an earlier boot gets this boot's time too, since its wall time
// alone could be set back.
func (s *State) InThisBoot(d capabilities.Deadline) capabilities.Deadline {
	a, due := s.l.meta.anchor, s.l.committed().due
	if d.IsZero() || !a.set || d.BootID == due.bootID {
		return d
	}
	left := d.Wall.Sub(nanoTime(a.wall))
	d.BootID, d.Boot = due.bootID, max(0, nanoDuration(a.boot)+left)
	return d
}
