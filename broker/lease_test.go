package broker

import (
	"context"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/broker/reconcile"
	"spectrum-os.org/broker/clock"
)

// leasing is a broker by a clock that the test turns.
func leasing(t *testing.T) (*granting, *clock.Fake) {
	t.Helper()
	fake := clock.NewFake()
	return newGrantingAt(t, allowsAll, allowsAll, fake), fake
}

// wake does what keepTime does when it looks.
func (g *granting) wake() {
	g.ledger.View(func(s *ledger.State) {
		for vm := range s.DueHolders(g.o.Clock.Now()) {
			g.reconciler.Wake(vm)
		}
	})
}

// gone asserts that a lease is over and nothing is left of it.
func (g *granting) gone(id uuid.UUID) {
	g.t.Helper()
	g.wake()
	g.awaitState(id, ledger.Revoked)
	if g.things.has(id) {
		g.t.Error("the lease is over, and its object is there")
	}
}

// lives asserts that a lease still runs, when all that would end it has looked.
func (g *granting) lives(id uuid.UUID) {
	g.t.Helper()
	g.wake()
	ctx, cancel := context.WithTimeout(g.t.Context(), 10*time.Second)
	defer cancel()
	if settled, err := g.reconciler.Settled(ctx, g.look(id).Holder); err != nil || !settled {
		g.t.Errorf("settled: %v, %v", settled, err)
	}
	if got := g.look(id); got.State != ledger.Active || !g.things.has(id) {
		g.t.Errorf("the lease is %s (%s), there is something of it: %v", got.State, got.Reason, g.things.has(id))
	}
}

// Each way to turn a clock, before a lease of ten minutes is used up. None of
// them lengthens it by a second; what shortens it is final.
func TestClocksThatAreTurned(t *testing.T) {
	const life = 10 * time.Minute
	turn := func(by time.Duration) func(*granting, *clock.Fake) {
		return func(_ *granting, c *clock.Fake) { c.SetWall(c.Now().Wall.Add(by)) }
	}
	for name, tc := range map[string]struct {
		turn func(g *granting, c *clock.Fake)
		// left is what the lease has then.
		left time.Duration
	}{
		"not at all":  {func(*granting, *clock.Fake) {}, 5 * time.Minute},
		"back":        {turn(-time.Hour), 5 * time.Minute},
		"far back":    {turn(-20 * 365 * 24 * time.Hour), 5 * time.Minute},
		"forward":     {turn(time.Hour), 0},
		"a bit ahead": {turn(2 * time.Minute), 3 * time.Minute},
		"forward and back": {func(g *granting, c *clock.Fake) {
			c.SetWall(c.Now().Wall.Add(time.Hour))
			g.wake()
			time.Sleep(10 * time.Millisecond)
			c.SetWall(c.Now().Wall.Add(-time.Hour))
		}, 0},
		"back across a restart": {func(g *granting, c *clock.Fake) {
			g.restart(func() { c.SetWall(c.Now().Wall.Add(-time.Hour)) })
		}, 5 * time.Minute},
		"suspended":             {func(_ *granting, c *clock.Fake) { c.Advance(time.Hour) }, 0},
		"suspended for a while": {func(_ *granting, c *clock.Fake) { c.Advance(4 * time.Minute) }, time.Minute},
		"suspended, and back": {func(_ *granting, c *clock.Fake) {
			c.Advance(4 * time.Minute)
			c.SetWall(c.Now().Wall.Add(-time.Hour))
		}, time.Minute},
		"no broker at its end": {func(g *granting, c *clock.Fake) {
			g.restart(func() { c.Advance(life) })
		}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			g, c := leasing(t)
			lease, bystander := g.granted(mail1, "/lease", ttl(int64(life/time.Second))), g.granted(mail2, "/bystander")
			c.Advance(5 * time.Minute)
			tc.turn(g, c)
			if tc.left > 0 {
				g.lives(lease.ID)
				c.Advance(tc.left - time.Nanosecond)
				g.lives(lease.ID)
				c.Advance(time.Nanosecond)
			}
			g.gone(lease.ID)
			g.lives(bystander.ID)
		})
	}
}

// Across a reboot only the wall clock, and the mark that the ledger keeps of it,
// tell how old a grant is. It persists, and waits for its VM.
func TestClocksAcrossAReboot(t *testing.T) {
	for name, tc := range map[string]struct {
		off, set time.Duration
		left     time.Duration
	}{
		"at once":            {0, 0, 5 * time.Minute},
		"for a while":        {4 * time.Minute, 0, time.Minute},
		"for too long":       {time.Hour, 0, 0},
		"and the clock back": {time.Minute, -time.Hour, 5 * time.Minute},
		"and forward":        {0, time.Hour, 0},
	} {
		t.Run(name, func(t *testing.T) {
			g, c := leasing(t)
			lease := g.granted(mail1, "/lease", ttl(600), persists)
			c.Advance(5 * time.Minute)
			g.append(ledger.Event{Type: ledger.ClockHighwater, Actor: brokerActor, Data: ledger.JSON(ledger.HighwaterData{Wall: c.Now().Wall})})
			g.restart(func() {
				c.Reboot(uuid.NewString(), tc.off)
				c.SetWall(c.Now().Wall.Add(tc.set))
			})
			if tc.left > 0 {
				g.lives(lease.ID)
				c.Advance(tc.left - time.Nanosecond)
				g.lives(lease.ID)
				c.Advance(time.Nanosecond)
			}
			g.gone(lease.ID)
		})
	}
}

// TestRenewedAcrossAReboot: a renewal in one boot is kept in the next, where
// nothing but wall time means anything, and can be renewed there.
func TestRenewedAcrossAReboot(t *testing.T) {
	g, c := leasing(t)
	lease := g.granted(mail1, "/lease", ttl(600), persists)
	g.renewed(lease.ID, seconds(1200), false)
	g.restart(func() { c.Reboot(uuid.NewString(), 15*time.Minute) })
	g.lives(lease.ID)
	g.renewed(lease.ID, seconds(600), false)
	c.Advance(10*time.Minute - 1)
	g.lives(lease.ID)
	c.SetWall(c.Now().Wall.Add(-time.Hour))
	c.Advance(1)
	g.gone(lease.ID)
}

// TestExpireBeforeServing asks everything that can be asked about a lease at the
// moment at which a machine resumes, before anything has looked at the clock.
func TestExpireBeforeServing(t *testing.T) {
	g, c := leasing(t)
	g.ready.Store(true)

	lease := g.granted(mail1, "/lease", ttl(600))
	token, _, err := g.mint(t.Context(), brokerActor, lease)
	if err != nil {
		t.Fatal(err)
	}
	guest := guestService{g.Broker}
	if _, err := guest.ownToken(t.Context(), mail1, token); err != nil {
		t.Fatalf("while it runs its token is refused: %v", err)
	}
	// Nothing looks from here on.
	g.reconciler.Close()
	c.Advance(time.Hour)
	c.SetWall(c.Now().Wall.Add(-2 * time.Hour))
	if got := g.look(lease.ID); got.State != ledger.Active {
		t.Fatalf("somebody looked: it is %s", got.State)
	}
	by := api.Caller{Kind: api.CallerPerson, UID: 1000}
	if _, err := guest.ownToken(t.Context(), mail1, token); api.CodeOf(err) != api.CodeTokenRefused {
		t.Errorf("its token: %v", err)
	}
	if _, err := g.Token(t.Context(), by, lease.ID.String()); api.CodeOf(err) != api.CodeConflict {
		t.Errorf("another token: %v", err)
	}
	if _, err := g.Renew(t.Context(), by, lease.ID.String(), api.RenewRequest{}); api.CodeOf(err) != api.CodeConflict {
		t.Errorf("a renewal: %v", err)
	}
	derived := g.asks(mail1, "/lease/part", func(r *request) { r.parent = &lease })
	if _, err := g.grant(t.Context(), derived); api.CodeOf(err) != api.CodeDenied {
		t.Errorf("a grant that derives from it: %v", err)
	}
	if shown, err := g.ShowGrant(t.Context(), lease.ID.String()); err != nil || shown.State != api.GrantRevoking {
		t.Errorf("people see it as %s (%s), %v", shown.State, shown.Reason, err)
	}
	for _, state := range []api.GrantState{api.GrantActive, api.GrantRevoking} {
		listed, err := g.ListGrants(t.Context(), api.GrantFilter{State: []api.GrantState{state}})
		if want := state == api.GrantRevoking; err != nil || (len(listed) == 1) != want {
			t.Errorf("it is listed among those that are %s: %v, %v", state, listed, err)
		}
	}
	own, err := guest.Capabilities(t.Context(), mail1)
	if err != nil || len(own) != 1 || own[0].State != api.GrantRevoking {
		t.Errorf("its holder sees %+v, %v", own, err)
	}
}

// TestExpiredWhileItIsWithdrawn: a guest that holds on to a share whose lease is
// over has no token for it.
func TestExpiredWhileItIsWithdrawn(t *testing.T) {
	g, c := leasing(t)
	lease := g.granted(mail1, "/lease", ttl(600))
	stuck := make(chan struct{})
	g.things.mu.Lock()
	g.things.stuck = stuck
	g.things.mu.Unlock()
	c.Advance(10 * time.Minute)
	g.wake()
	g.awaitState(lease.ID, ledger.Revoking)
	if !g.things.has(lease.ID) {
		t.Fatal("its object is gone already")
	}
	by := api.Caller{Kind: api.CallerPerson, UID: 1000}
	if _, err := g.Token(t.Context(), by, lease.ID.String()); api.CodeOf(err) != api.CodeConflict {
		t.Errorf("a token: %v", err)
	}
	if _, err := g.Renew(t.Context(), by, lease.ID.String(), api.RenewRequest{}); api.CodeOf(err) != api.CodeConflict {
		t.Errorf("a renewal: %v", err)
	}
	close(stuck)
	g.gone(lease.ID)
}

// Who is woken because a lease ends may look at the ledger, also while somebody
// writes: the end of a lease must not hold up the commit that makes it one.
func TestWakingHoldsUpNobody(t *testing.T) {
	g, fake := leasing(t)
	g.things.needs = mail1
	ttl := int64(60)
	lease := g.granted(mail1, "/docs", func(r *request) { r.ttl = &ttl })
	g.granted(mail2, "/docs")
	g.reconciler.Close()
	g.reconciler = reconcile.New(reconcile.Options{
		Appliers: []reconcile.Applier{g.things}, Ledger: g.ledger, Clock: fake, Sweep: 50 * time.Millisecond, Meter: g.metrics.meter,
		Instances: func() map[uuid.UUID]string {
			if g.o.Clock.Now().Wall.After(lease.Created.Add(time.Minute)) {
				_, _ = g.ledger.Update(g.ctx, func(tx *ledger.Tx) error {
					return tx.Append(ledger.Event{Type: ledger.ClockHighwater, Actor: brokerActor})
				})
			}
			return g.usable()
		},
	})
	for _, vm := range []uuid.UUID{mail1, mail2} {
		if settled, err := g.reconciler.Settled(t.Context(), vm); err != nil || !settled {
			t.Fatalf("settled: %v, %v", settled, err)
		}
	}
	fake.Advance(2 * time.Minute)
	g.wg.Go(func() { g.keepTime(g.ctx) })
	g.awaitState(lease.ID, ledger.Revoked)
}
