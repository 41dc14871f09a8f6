package ledger

import (
	"errors"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
)

// A trouble begins once and ends once, survives a restart, and ends with its
// grant.
func TestTrouble(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, clock.NewFake())
	id := uuid.New()
	put(t, l, requested(id, GrantRecord{Capability: capability(t, "/a")}))
	troubled := func(reason string) Event { return NewChange(GrantTroubled, someone, id, Change{Reason: reason}) }
	recovered := NewChange(GrantRecovered, someone, id, Change{})
	const why = "nobody answers"
	for _, c := range []struct {
		name  string
		event Event
		err   error
		want  string
	}{
		{"an end without a beginning", recovered, ErrIllegalMove, ""},
		{"a beginning without a reason", troubled(""), ErrInvalidEvent, ""},
		{"a beginning", troubled(why), nil, why},
		{"a second one", troubled("other"), ErrIllegalMove, why},
		{"a move", NewChange(GrantActive, someone, id, Change{Instance: "run"}), nil, why},
		{"its end", recovered, nil, ""},
		{"a second end", recovered, ErrIllegalMove, ""},
		{"another beginning", troubled(why), nil, why},
		{"the grant's end", NewChange(GrantRevoking, someone, id, Change{Reason: "test"}), nil, why},
		{"the very end", NewChange(GrantRevoked, someone, id, Change{}), nil, ""},
		{"one of a grant that is no more", troubled(why), ErrIllegalMove, ""},
		{"of no grant", NewChange(GrantTroubled, someone, uuid.New(), Change{Reason: why}), ErrIllegalMove, ""},
	} {
		if err := try(l, c.event); !errors.Is(err, c.err) {
			t.Errorf("%s: %v, want %v", c.name, err, c.err)
		}
		for _, when := range []string{"", " after a restart"} {
			if when != "" {
				if err := l.Close(); err != nil {
					t.Fatal(err)
				}
				l = open(t, dir, clock.NewFake())
			}
			l.View(func(s *State) {
				if g, _ := s.Grant(id); g.Troubled != c.want {
					t.Errorf("%s%s: the trouble is %q, want %q", c.name, when, g.Troubled, c.want)
				}
			})
		}
	}
}

// What changes what should exist is ordered across grants and runs, and nothing
// else counts as a change.
func TestChangedIsOrdered(t *testing.T) {
	l := open(t, t.TempDir(), clock.NewFake())
	a, b := uuid.New(), uuid.New()
	changed := func(id uuid.UUID) (n uint64) {
		l.View(func(s *State) {
			g, _ := s.Grant(id)
			n = g.Changed
		})
		return n
	}
	run := func() (n uint64) {
		l.View(func(s *State) { n = s.RunChanged(holder) })
		return n
	}
	if run() != 0 {
		t.Errorf("a VM that never ran changed at %d", run())
	}
	last := uint64(0)
	later := func(what string, at uint64) {
		t.Helper()
		if at <= last {
			t.Errorf("%s: %d is not after %d", what, at, last)
		}
		last = at
	}
	put(t, l, Event{Type: VMStarted, Actor: someone, VM: holder, Data: JSON(RunData{Instance: "1"})})
	later("a start", run())
	put(t, l, requested(a, GrantRecord{Capability: capability(t, "/a")}))
	later("a grant", changed(a))
	put(t, l, requested(b, GrantRecord{Capability: capability(t, "/a")}))
	later("another grant", changed(b))
	c := uuid.New()
	fake := clock.NewFake().Now()
	put(t, l, requested(c, GrantRecord{Capability: capability(t, "/a"), Deadline: capabilities.NewDeadline(fake, time.Hour)}))
	later("a lease", changed(c))
	put(t, l, NewRenewal(someone, c, RenewData{Deadline: capabilities.NewDeadline(fake, 2*time.Hour)}))
	later("its renewal", changed(c))
	before := changed(a)
	put(t, l, NewChange(GrantActive, someone, a, Change{Instance: "1"}), NewChange(GrantDegraded, someone, a, Change{Reason: "x"}),
		NewChange(GrantTroubled, someone, a, Change{Reason: "x"}), NewChange(GrantRecovered, someone, a, Change{}))
	if changed(a) != before {
		t.Errorf("what leaves desired as it is changed it at %d", changed(a))
	}
	put(t, l, NewChange(GrantRevoking, someone, a, Change{}))
	later("an end", changed(a))
	before = changed(a)
	put(t, l, NewChange(GrantRevoked, someone, a, Change{}))
	if changed(a) != before {
		t.Errorf("the confirmation of an end is a change: %d", changed(a))
	}
	put(t, l, Event{Type: VMExited, Actor: someone, VM: holder, Data: JSON(RunData{Instance: "1"})})
	later("an exit", run())
	put(t, l, NewChange(GrantTroubled, someone, b, Change{Reason: "x"}))
	seq, hash := l.Head()
	put(t, l, Event{Type: LedgerRestored, Actor: someone, Data: JSON(RestoredData{Epoch: 2, From: Anchor{seq, hash}, Reason: "restored"})})
	later("a restored ledger", changed(b))
	l.View(func(s *State) {
		if g, _ := s.Grant(b); g.State != Revoking || g.Reason != "restored" || g.Troubled != "x" {
			t.Errorf("restored, a grant is %s (%s), with the trouble %q", g.State, g.Reason, g.Troubled)
		}
	})
}
