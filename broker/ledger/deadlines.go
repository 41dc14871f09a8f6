package ledger

import (
	"math"
	"time"

	"github.com/google/uuid"
	"spectrum-os.org/broker/capabilities"
)

func nanoTime(ns int64) time.Time                               { return time.Unix(0, ns).UTC() }
func nanoDuration(ns int64) time.Duration                       { return time.Duration(ns) }
func remaining(n *node, now capabilities.Instant) time.Duration { return n.deadline().Remaining(now) }

// deadlines orders the grants that have a deadline: by wall time, and those
// of the present boot by boot time too, since either clock may be the one
// that ends a lease. Grants that ended are dropped when they surface.
type deadlines struct {
	bootID     string
	wall, boot deadlineHeap
}

// deadlineHeap is a binary heap, the earliest first.
type deadlineHeap []timed

type timed struct {
	at   int64
	node int32
}

func (d *deadlines) add(i int32, n *node) {
	if !n.about.hasDeadline {
		return
	}
	d.wall.push(timed{n.wall, i})
	if n.about.bootID == d.bootID && d.bootID != "" {
		d.boot.push(timed{n.boot, i})
	}
}

// prune keeps the earliest of each heap one that still runs.
func (d *deadlines) prune(l *layer) {
	for _, h := range []*deadlineHeap{&d.wall, &d.boot} {
		for len(*h) > 0 && l.get((*h)[0].node).stateName().Ended() {
			h.pop()
		}
	}
}

func (h *deadlineHeap) push(t timed) {
	*h = append(*h, t)
	s := *h
	for i := len(s) - 1; i > 0; {
		up := (i - 1) / 2
		if s[up].at <= s[i].at {
			return
		}
		s[up], s[i] = s[i], s[up]
		i = up
	}
}

func (h *deadlineHeap) pop() {
	s := *h
	s[0] = s[len(s)-1]
	s = s[:len(s)-1]
	*h = s
	for i := 0; ; {
		least := i
		for _, c := range [...]int{2*i + 1, 2*i + 2} {
			if c < len(s) && s[c].at < s[least].at {
				least = c
			}
		}
		if least == i {
			return
		}
		s[i], s[least] = s[least], s[i]
		i = least
	}
}

// until calls fn for every entry at or before at, and stops when fn says no.
func (h deadlineHeap) until(at int64, fn func(i int32) bool) {
	stack := []int{0}
	for len(stack) > 0 {
		k := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if k >= len(h) || h[k].at > at {
			continue
		}
		if !fn(h[k].node) {
			return
		}
		stack = append(stack, 2*k+1, 2*k+2)
	}
}

// committed is the bottom layer and how many nodes it has.
func (l *layer) committed() *layer {
	for l.below != nil {
		l = l.below
	}
	return l
}

// Due are grants that passed their deadline and are neither revoking nor
// ended, at most limit of them; 0 means all.
func (s *State) Due(now capabilities.Instant, limit int) []uuid.UUID {
	now = s.Effective(now)
	root := s.l.committed()
	var out []uuid.UUID
	seen := map[int32]bool{}
	take := func(i int32) bool {
		n := s.l.get(i)
		if !seen[i] && !n.stateName().Ended() && remaining(n, now) == 0 && n.about.hasDeadline {
			seen[i] = true
			out = append(out, n.id)
		}
		return limit <= 0 || len(out) < limit
	}
	root.due.wall.until(now.Wall.UnixNano(), take)
	if (limit <= 0 || len(out) < limit) && now.BootID == root.due.bootID {
		root.due.boot.until(int64(now.Boot), take)
	}
	for i := root.len(); i < s.l.len() && (limit <= 0 || len(out) < limit); i++ {
		take(i)
	}
	return out
}

// NextDeadline is how long it is until the next grant that has not ended
// passes its deadline: zero where one has passed already, false where none
// has a deadline.
func (s *State) NextDeadline(now capabilities.Instant) (time.Duration, bool) {
	now = s.Effective(now)
	root := s.l.committed()
	next, found := time.Duration(math.MaxInt64), false
	look := func(i int32) {
		n := s.l.get(i)
		if n.about.hasDeadline && !n.stateName().Ended() {
			next, found = min(next, remaining(n, now)), true
		}
	}
	for _, h := range []deadlineHeap{root.due.wall, root.due.boot} {
		if len(h) > 0 {
			look(h[0].node)
		}
	}
	for i := root.len(); i < s.l.len(); i++ {
		look(i)
	}
	return next, found
}
