package reconcile

import (
	"context"

	"spectrum-os.org/broker/broker/ledger"
)

// Most VMs do not run, and all that they hold waits until they do. What is asked
// here makes nothing of each of those grants.

// quiet tells whether nothing has ended, by the ledger or because it is barred,
// that a VM still holds, and nothing is being taken from it.
func (r *Reconciler) quiet(c corner) bool {
	r.mu.Lock()
	stirs := len(r.barred) > 0 || len(r.cut[c.vm]) > 0 || r.busy[c] > 0
	r.mu.Unlock()
	if stirs {
		return false
	}
	now := r.o.Clock.Now()
	dead := false
	r.o.Ledger.View(func(s *ledger.State) { dead = s.HoldsDead(c.vm, now) })
	return !dead
}

// idle tells whether the look at everything that a quiet VM holds would find
// nothing to do: it does not run, and the world has nothing of it.
func (r *Reconciler) idle(ctx context.Context, c corner) (bool, error) {
	if _, runs := r.o.Instances()[c.vm]; runs || r.struggles(c) {
		return false, nil
	}
	seen, err := r.observe(ctx, c)
	return err == nil && len(seen) == 0, err
}

// struggles tells whether there is trouble in a corner, which a look may end.
func (r *Reconciler) struggles(c corner) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, t := range r.troubles {
		if t.Object.VM == c.vm && t.Object.Kind == c.kind {
			return true
		}
	}
	return false
}

// takes tells whether anything is being taken away in a corner.
func (r *Reconciler) takes(c corner) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.busy[c] > 0
}
