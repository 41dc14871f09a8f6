package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/policy"
)

// actionRenew is the action on record of a renewal that was refused. Policy is
// asked for a grant: what it would not give now it does not prolong.
const actionRenew = "renew"

// defaultRenewWait is how long a renewal waits until its VM knows.
const defaultRenewWait = 30 * time.Second

// Renew implements api.Service.
func (b *Broker) Renew(ctx context.Context, by api.Caller, ref string, req api.RenewRequest) (api.Grant, error) {
	g, err := b.resolveGrant(ref)
	if err != nil {
		return api.Grant{}, err
	}
	if g, err = b.renew(ctx, actorOf(by), g, req.TTLSeconds, req.AcceptNarrower); err != nil {
		return api.Grant{}, err
	}
	if req.Wait {
		wait, cancel := b.bounded(ctx, req.TimeoutSeconds, defaultRenewWait)
		defer cancel()
		if g, err = b.told(wait, g); err != nil {
			return api.Grant{}, err
		}
	}
	return b.apiGrant(ctx, g), nil
}

// renew asks policy again, and moves the deadline of a grant where it may be
// moved. Whatever refuses that is on record, and leaves the grant as it was.
// What it returns is durable; the world is told after that.
func (b *Broker) renew(ctx context.Context, actor ledger.Actor, g ledger.Grant, ttl *int64, narrower bool) (ledger.Grant, error) {
	began := time.Now()
	r := request{
		action: policy.ActionGrant, actor: actor, holder: g.Holder, capability: g.Capability, ttl: ttl,
		label: g.Label, persist: g.Persist, renews: g.ID,
		// What is narrower is looked at here: a renewal changes nothing but the end.
		narrower: true,
	}
	d := decided{request: r}
	if err := b.renewable(g); err != nil {
		return ledger.Grant{}, b.recordDenial(ctx, d, err)
	}
	if ttl == nil {
		again := lastLifetime(g)
		r.ttl = &again
	}
	if g.Parent != uuid.Nil {
		var parent ledger.Grant
		b.ledger.View(func(s *ledger.State) { parent, _ = s.Grant(g.Parent) })
		r.parent = &parent
	}
	d, err := b.decide(ctx, r, false)
	b.metrics.decided(d.verdict, time.Since(began))
	if err == nil {
		err = b.asMuchAsBefore(d, g, narrower)
	}
	if err != nil {
		return ledger.Grant{}, b.recordDenial(ctx, d, err)
	}
	decision, err := json.Marshal(recordedDecision{Narrowed: d.narrowed, Verdict: recordedVerdict(d.verdict)})
	if err != nil {
		return ledger.Grant{}, fmt.Errorf("cannot encode the decision: %w", err)
	}
	name := b.vmName(g.Holder)
	_, err = b.ledger.Update(ctx, func(tx *ledger.Tx) error {
		s := tx.State()
		// All of it may have changed while policy was thinking.
		g, _ = s.Grant(g.ID)
		if err := notLive(b.reconciler.Live(s, g.ID), g); err != nil {
			return err
		}
		if run, on := s.Running(g.Holder); !g.Persist && (!on || run != g.Instance) {
			return errRunOver(name)
		}
		until, err := b.renewedUntil(s, tx.Now(), g, time.Duration(*d.ttl)*time.Second, narrower)
		if err != nil {
			return err
		}
		if err := tx.Append(ledger.NewRenewal(actor, g.ID, ledger.RenewData{Deadline: until, Decision: decision})); err != nil {
			return err
		}
		g, _ = s.Grant(g.ID)
		return nil
	})
	switch {
	case err == nil:
	case errors.Is(err, ledger.ErrIllegalMove), errors.Is(err, ledger.ErrNotCovered), errors.Is(err, ledger.ErrInvalidEvent):
		return ledger.Grant{}, b.recordDenial(ctx, d, api.Errorf(api.CodeConflict, "grant %s cannot be renewed: %w", g.ID, err))
	default:
		if _, ok := asAPI(err); ok {
			return ledger.Grant{}, b.recordDenial(ctx, d, err)
		}
		return ledger.Grant{}, uncertain("the grant is not renewed, and ends when it was to end", err)
	}
	b.reconciler.Wake(g.Holder)
	return g, nil
}

// renewable refuses what has no end that could be moved, or is over.
func (b *Broker) renewable(g ledger.Grant) error {
	var live error
	b.ledger.View(func(s *ledger.State) { live = b.reconciler.Live(s, g.ID) })
	if err := notLive(live, g); err != nil {
		return err
	}
	if g.Deadline.IsZero() {
		until := "until its VM exits"
		if g.Persist {
			until = "until it is revoked"
		}
		return api.Errorf(api.CodeConflict, "grant %s has no deadline: it lasts %s, and there is nothing to renew", g.ID, until)
	}
	return nil
}

func notLive(live error, g ledger.Grant) error {
	if live == nil {
		return nil
	}
	return api.Errorf(api.CodeConflict, "grant %s is over and cannot be renewed; ask for a new one: %w", g.ID, live)
}

// lastLifetime is how long a grant was given for when its deadline was last
// set, in seconds.
func lastLifetime(g ledger.Grant) int64 {
	since := g.Created
	if !g.Renewed.IsZero() {
		since = g.Renewed
	}
	return max(1, int64(g.Deadline.Wall.Sub(since)/time.Second))
}

// asMuchAsBefore refuses a renewal for which policy would now give less than the
// grant has: the grant cannot become another one.
func (b *Broker) asMuchAsBefore(d decided, g ledger.Grant, narrower bool) error {
	said := apiVerdict(d.verdict)
	refuse := func(code api.Code, format string, args ...any) error {
		e := api.Errorf(code, format, args...)
		e.Verdict = &said
		return e
	}
	if !d.capability.Equal(g.Capability) {
		return refuse(api.CodeDenied, "policy now allows only %s, and a renewal changes nothing but the end of a grant; ask for a new one", b.spoken(d.capability))
	}
	for _, limit := range []struct {
		name     string
		now, was *int
	}{{"max_depth", d.limits.MaxDepth, g.Limits.MaxDepth}, {"max_uses", d.limits.MaxUses, g.Limits.MaxUses}} {
		if limit.now != nil && (limit.was == nil || *limit.was > *limit.now) {
			return refuse(api.CodeDenied, "policy now limits %s to %d, and a renewal changes nothing but the end of a grant; ask for a new one", limit.name, *limit.now)
		}
	}
	if asked := *d.request.ttl; *d.ttl < asked && !narrower {
		return refuse(api.CodeNarrower, "policy allows less than was asked: %v instead of %v; ask for that, or accept a narrower renewal",
			time.Duration(*d.ttl)*time.Second, time.Duration(asked)*time.Second)
	}
	return nil
}

// renewedUntil is the deadline of a renewal: later than before, and no later
// than the parent's.
func (b *Broker) renewedUntil(s *ledger.State, now capabilities.Instant, g ledger.Grant, ttl time.Duration, narrower bool) (capabilities.Deadline, error) {
	until := capabilities.NewDeadline(now, ttl)
	parent, _ := s.Grant(g.Parent)
	byParent := !parent.Deadline.IsZero() && parent.Deadline.Remaining(now) < ttl
	if byParent {
		if !narrower {
			return until, api.Errorf(api.CodeNarrower, "grant %s derives from %s, which ends at %s, sooner than %v from now; renew that first, or accept a narrower renewal to end with it",
				g.ID, parent.ID, hostTime(parent.Deadline.Wall).Format(time.RFC3339), ttl)
		}
		until = capabilities.Earliest(now, until, parent.Deadline)
	}
	if until.Remaining(now) > g.Deadline.Remaining(now) {
		return until, nil
	}
	ends := hostTime(g.Deadline.Wall).Format(time.RFC3339)
	if byParent {
		return until, api.Errorf(api.CodeConflict, "grant %s ends at %s, with %s, from which it derives; renew that first", g.ID, ends, parent.ID)
	}
	return until, api.Errorf(api.CodeInvalid, "grant %s ends at %s, and a renewal never ends it sooner: %v from now is no later; it stays as it is", g.ID, ends, ttl)
}

// told waits until what serves a renewed grant knows its deadline.
func (b *Broker) told(ctx context.Context, g ledger.Grant) (ledger.Grant, error) {
	const look = 25 * time.Millisecond
	generation := g.Generation
	for {
		var live error
		b.ledger.View(func(s *ledger.State) {
			g, _ = s.Grant(g.ID)
			live = s.Live(g.ID, b.o.Clock.Now())
		})
		if live != nil {
			why := live.Error()
			orElse(&g.Reason, why)
			e := api.Errorf(api.CodeConflict, "grant %s was renewed, and ended: %s", g.ID, g.Reason)
			shown := b.apiGrant(ctx, g)
			e.Grant = &shown
			return g, e
		}
		if b.knows(ctx, g, generation) {
			return g, nil
		}
		select {
		case <-ctx.Done():
			e := api.Errorf(api.CodeTimeout, "grant %s is renewed on record, and what serves it in its VM does not know yet; `spectrum-cap show %s` tells how it goes on", g.ID, g.ID)
			shown := b.apiGrant(context.WithoutCancel(ctx), g)
			e.Grant = &shown
			return g, e
		case <-time.After(look):
		}
	}
}

// knows tells whether all that exists of a grant has this generation at least.
// What does not exist yet will be made with it.
func (b *Broker) knows(ctx context.Context, g ledger.Grant, generation uint64) bool {
	seen, err := b.reconciler.Sight(ctx, g.Holder)
	if err != nil {
		return false
	}
	for _, o := range b.reconciler.ObjectsOf(g) {
		if is, ok := seen[o.ID]; ok && is.Generation < generation {
			return false
		}
	}
	return true
}
