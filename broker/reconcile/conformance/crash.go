package conformance

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"spectrum-os.org/broker/broker/reconcile"
)

// crashBeforeApplyIsRecorded has the broker die when an application is done and
// nobody was told. The next one finds it, does it again, and changes nothing.
func crashBeforeApplyIsRecorded(r *rig) {
	a := r.Object("a", 1)
	r.apply(a)
	before := r.World()[a.ID]
	r.restart()
	r.only(a)
	r.apply(a)
	r.only(a)
	if after := r.World()[a.ID]; after != before {
		r.Errorf("done again it is %v, not %v", after, before)
	}
	r.restart()
	a.Generation = 2
	r.withdraw(a)
	r.only()
}

// crashBeforeWithdrawIsRecorded is the same for a withdrawal: what is gone stays
// gone, and can be withdrawn once more.
func crashBeforeWithdrawIsRecorded(r *rig) {
	a, b := r.Object("a", 1), r.Object("b", 1)
	r.apply(a)
	r.apply(b)
	a.Generation = 2
	r.withdraw(a)
	r.restart()
	r.only(b)
	r.withdraw(a)
	r.only(b)
	for _, late := range []uint64{1, 2} {
		_, err := r.a.Apply(r.ctx(), r.Object("a", late))
		r.stale(err, fmt.Sprintf("generation %d after the withdrawal of 2", late))
	}
	r.only(b)
}

// applyAndWithdrawAtOnce has many of both for one object. Each withdrawal that
// returns says that nothing is left, and nothing comes back.
func applyAndWithdrawAtOnce(r *rig) {
	a, end := r.Object("a", 1), r.Object("a", 2)
	ctx := r.ctx()
	var wg sync.WaitGroup
	errs := make(chan error, 16)
	for range 8 {
		wg.Go(func() {
			if _, err := r.a.Apply(ctx, a); errors.Is(err, reconcile.ErrNotNow) {
				errs <- fmt.Errorf("an application that was overtaken says %w", err)
			}
		})
		wg.Go(func() {
			_, err := r.a.Withdraw(ctx, end)
			if w := r.World(); err == nil && len(w) != 0 {
				err = fmt.Errorf("withdrawn, and the world has %v", w)
			}
			if err != nil {
				errs <- err
			}
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		r.Error(err)
	}
	r.only()
	_, err := r.a.Apply(r.ctx(), a)
	r.stale(err, "the overtaken application, again")
	r.only()
}

// callersThatAreGone calls with a context that has ended. That may do nothing, or
// what was asked for, and must not say that it did what it did not.
func callersThatAreGone(r *rig) {
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	a, b := r.Object("a", 1), r.Object("b", 1)
	r.apply(b)
	if _, err := r.a.Apply(gone, a); err == nil {
		if _, there := r.World()[a.ID]; !there {
			r.Error("an application without a caller says that it is done, and nothing is there")
		}
	}
	b.Generation = 2
	if _, err := r.a.Withdraw(gone, b); err == nil {
		if thing, there := r.World()[b.ID]; there {
			r.Errorf("a withdrawal without a caller says that it is done, and the world has %v", thing)
		}
	}
	if seen, err := r.a.Observe(gone, a.VM); err == nil {
		known := r.observe()
		for _, o := range seen {
			if _, ok := known[o.ID]; !ok {
				r.Errorf("a look without a caller saw %+v", o)
			}
		}
	}
	r.apply(a)
	r.withdraw(b)
	r.only(a)
}

// callersThatLeave has the caller leave at each place of a call, which ends soon
// after: a broker that stops, or gives up, waits for it.
func callersThatLeave(r *rig) {
	const soon = 10 * time.Second
	left := func(t *testing.T, at func(leave func()), call func(ctx context.Context)) {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		returned := make(chan struct{})
		at(cancel)
		go func() {
			defer close(returned)
			call(ctx)
		}()
		select {
		case <-ctx.Done():
		case <-returned:
		case <-time.After(limit):
			t.Fatal("the call never gets to where its caller shall leave")
		}
		select {
		case <-returned:
		case <-time.After(soon):
			t.Fatalf("the call goes on %v after its caller has left", soon)
		}
	}
	for _, place := range sorted(r.Interrupt) {
		r.Run("apply "+place, func(t *testing.T) {
			r := &rig{T: t, Harness: r.Harness, a: r.New()}
			a := r.Object(place, 1)
			left(t, r.Interrupt[place], func(ctx context.Context) { _, _ = r.a.Apply(ctx, a) })
			a.Generation = 2
			r.withdraw(a)
			r.only()
		})
	}
	for _, place := range sorted(r.InterruptWithdraw) {
		r.Run("withdraw "+place, func(t *testing.T) {
			r := &rig{T: t, Harness: r.Harness, a: r.New()}
			a := r.Object("w"+place, 1)
			r.apply(a)
			a.Generation = 2
			left(t, r.InterruptWithdraw[place], func(ctx context.Context) { _, _ = r.a.Withdraw(ctx, a) })
			r.withdraw(a)
			r.only()
		})
	}
}
