package reconcile

import (
	"context"
	"strings"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
)

// Trouble is a step that failed and is tried again.
type Trouble struct {
	Object Object
	Verb   Verb
	// Since is when it failed first, Attempts how often it has, and Next when it
	// is tried again; the zero time where it is being tried.
	Since    time.Time
	Attempts int
	Next     time.Time
	Err      error
}

// trouble is a Trouble, and what ends its pause.
type trouble struct {
	Trouble
	pause time.Duration
	// run is that of the VM in which it failed. Another one is another chance.
	run string
}

// pauses tells whether a step is not to be tried yet. Something newer, or in
// another run, is not held up by it.
func (t *trouble) pauses(a Action, run string) bool {
	return t != nil && t.Verb == a.Verb && t.run == run && a.Object.Generation <= t.Object.Generation && time.Now().Before(t.Next)
}

// fail notes that a step failed, and returns how long to pause. The first failure
// of a row is put on record for the grants concerned. most bounds the pause.
func (r *Reconciler) fail(ctx context.Context, a Action, run string, err error, most time.Duration) time.Duration {
	id := a.Object.ID
	r.o.Meter.Failed(a.Object.Kind, string(a.Verb))
	r.mu.Lock()
	t := r.troubles[id]
	if t == nil || t.Verb.Cuts() != a.Verb.Cuts() {
		t = &trouble{Trouble: Trouble{Since: time.Now()}}
		r.troubles[id] = t
	}
	t.Object, t.Verb, t.Err, t.run = a.Object, a.Verb, err, run
	t.Attempts++
	t.pause = min(next(t.pause), most)
	pause := jittered(t.pause, 2)
	t.Next = time.Now().Add(pause)
	attempts := t.Attempts
	r.mu.Unlock()
	r.o.Log.Warn("cannot do it yet", "step", a.String(), "err", err, "attempts", attempts, "again_in", pause)
	if attempts > 1 {
		return pause
	}
	grants := a.Ended
	if !a.Verb.Cuts() {
		grants = a.Object.Owners
	}
	var events []ledger.Event
	for _, g := range grants {
		events = append(events, change(ledger.GrantTroubled, g, brief(a.Verb, err)))
	}
	// What cannot be recorded is tried again all the same.
	if err := r.append(ctx, events); err != nil {
		r.o.Log.Warn("cannot record that a grant has trouble", "object", id, "err", err)
	}
	return pause
}

// brief says in one line of the audit what does not work.
func brief(v Verb, err error) string {
	const most = 400
	what := "attach"
	switch {
	case v.Cuts():
		what = "detach"
	case v == Extend:
		what = "extend"
	}
	text := "cannot " + what + ": " + err.Error()
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + "…"
	}
	return text
}

// mend forgets the trouble of an object.
func (r *Reconciler) mend(object string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.troubles, object)
}

// recovered are the events that end the troubles on record of grants.
func (r *Reconciler) recovered(grants []uuid.UUID) []ledger.Event {
	var out []ledger.Event
	r.o.Ledger.View(func(s *ledger.State) {
		for _, id := range grants {
			if g, _ := s.Grant(id); g.Troubled != "" {
				out = append(out, change(ledger.GrantRecovered, id, ""))
			}
		}
	})
	return out
}

// forget drops the troubles of objects that nothing is to be done about any
// more.
func (r *Reconciler) forget(v view) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.troubles) == 0 {
		return
	}
	planned := make(map[string]bool, len(v.plan))
	for _, a := range v.plan {
		planned[a.Object.ID] = true
	}
	for id, t := range r.troubles {
		if t.Object.VM != v.corner.vm || t.Object.Kind != v.corner.kind || r.applying[id] != nil || r.cutting[id] != nil {
			continue
		}
		if !planned[id] {
			delete(r.troubles, id)
		}
	}
}

// TroubleOf is why an object cannot be made, or taken away, just now.
func (r *Reconciler) TroubleOf(object string) (Trouble, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := r.troubles[object]
	if t == nil {
		return Trouble{}, false
	}
	return r.present(t), true
}

// present is a trouble as it is now. r.mu is held.
func (r *Reconciler) present(t *trouble) Trouble {
	out := t.Trouble
	if c := r.cutting[t.Object.ID]; c != nil && !c.resting || r.applying[t.Object.ID] != nil {
		out.Next = time.Time{}
	}
	return out
}

// Troubles counts, by verb, the objects that something is tried again for.
func (r *Reconciler) Troubles() map[Verb]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := map[Verb]int{}
	for _, t := range r.troubles {
		out[t.Verb]++
	}
	return out
}
