package broker

import (
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/policy"
)

// actionOf is what policy is asked about: passing a grant on to another VM is
// delegating, whoever does it.
func actionOf(otherwise string, parent *ledger.Grant, holder uuid.UUID) string {
	if parent != nil && parent.Holder != holder {
		return policy.ActionDelegate
	}
	return otherwise
}

// checkLimits refuses a count of what cannot be counted.
func (b *Broker) checkLimits(r request) error {
	if r.limits.MaxUses != nil && b.kinds.Use(r.capability.Kind) == "" {
		return api.Errorf(api.CodeInvalid, "nothing of a %s capability can be counted, so it cannot have max_uses", r.capability.Kind)
	}
	return nil
}

// checkParent makes sure that nothing is amplified.
func (b *Broker) checkParent(r request) error {
	p := r.parent
	if p == nil {
		return nil
	}
	if !b.kinds.Covers(p.Capability, r.capability) {
		return api.Errorf(api.CodeDenied, "%s is wider than its parent %s", b.spoken(r.capability), b.spoken(p.Capability))
	}
	if p.Limits.MaxDepth != nil {
		if *p.Limits.MaxDepth < 1 {
			return api.Errorf(api.CodeDenied, "nothing may be derived from grant %s: its max_depth is used up", p.ID)
		}
		if asked := r.limits.MaxDepth; asked != nil && *asked >= *p.Limits.MaxDepth {
			return api.Errorf(api.CodeDenied, "max_depth %d is more than grant %s leaves: at most %d", *asked, p.ID, *p.Limits.MaxDepth-1)
		}
	}
	if most, asked := p.Limits.MaxUses, r.limits.MaxUses; most != nil && asked != nil && *asked > *most {
		return api.Errorf(api.CodeDenied, "%d uses are more than grant %s has: at most %d", *asked, p.ID, *most)
	}
	var usable error
	b.ledger.View(func(s *ledger.State) {
		usable = s.Usable(p.ID, b.o.Clock.Now())
		if r.renews != uuid.Nil {
			// What was derived before the last use is there for as long as that.
			usable = s.Live(p.ID, b.o.Clock.Now())
		}
	})
	if usable != nil {
		return api.Errorf(api.CodeDenied, "the parent is not in force: %w", usable)
	}
	return nil
}

// narrow intersects what was asked with what policy limits it to.
func (b *Broker) narrow(d *decided) error {
	l := d.verdict.Limits
	said := apiVerdict(d.verdict)
	refuse := func(code api.Code, format string, args ...any) error {
		e := api.Errorf(code, format, args...)
		e.Verdict = &said
		return e
	}
	if counted := b.uncountable(l, d.capability.Kind); len(counted) > 0 {
		return refuse(api.CodeDenied, "policy limits it by %s, and that of a %s capability cannot be counted",
			strings.Join(counted, ", "), d.capability.Kind)
	}
	var changes []string
	if l.ReadOnly {
		c, err := b.kinds.Attenuate(d.capability, capabilities.Narrowing{ReadOnly: true})
		if err != nil {
			return refuse(api.CodeDenied, "policy allows only reading: %w", err)
		}
		if !c.Equal(d.capability) {
			d.capability = c
			changes = append(changes, "read-only")
		}
	}
	if l.TTLSeconds != nil && (d.ttl == nil || *d.ttl > *l.TTLSeconds) {
		if *l.TTLSeconds <= 0 {
			return refuse(api.CodeDenied, "policy allows a lifetime of 0 seconds")
		}
		ttl := min(*l.TTLSeconds, maxTTL)
		d.ttl = &ttl
		changes = append(changes, fmt.Sprintf("for %v", time.Duration(ttl)*time.Second))
	}
	var from ledger.Limits
	if d.parent != nil {
		from = d.parent.Limits
	}
	if from.MaxDepth != nil {
		below := *from.MaxDepth - 1
		d.limits.MaxDepth = least(d.limits.MaxDepth, &below)
	}
	d.limits.MaxUses = least(d.limits.MaxUses, from.MaxUses)
	if depth := count(l.MaxDepth); depth != nil {
		if asked := d.request.limits.MaxDepth; asked != nil && *depth < *asked {
			changes = append(changes, fmt.Sprintf("to be passed on %d deep", *depth))
		}
		d.limits.MaxDepth = least(d.limits.MaxDepth, depth)
	}
	if uses := count(l.MaxUses); uses != nil {
		if *uses == 0 {
			return refuse(api.CodeDenied, "policy allows 0 uses")
		}
		if d.limits.MaxUses == nil || *uses < *d.limits.MaxUses {
			d.limits.MaxUses = uses
			changes = append(changes, fmt.Sprintf("for at most %d uses", *uses))
		}
	}
	if ends := b.endsSooner(d); ends != nil {
		if !d.narrower {
			return refuse(api.CodeNarrower, "%w", ends)
		}
		d.narrowed = true
	}
	if len(changes) == 0 {
		return nil
	}
	d.narrowed = true
	if !d.narrower {
		return refuse(api.CodeNarrower, "policy allows less than was asked: %s, %s; ask for that, or accept a narrower grant",
			b.spoken(d.capability), strings.Join(changes, " and "))
	}
	return nil
}

// endsSooner says that a lifetime which was asked for, and allowed, is cut short by
// the end of the parent. A renewal says so itself.
func (b *Broker) endsSooner(d *decided) error {
	p := d.parent
	if p == nil || d.request.ttl == nil || d.renews != uuid.Nil {
		return nil
	}
	ttl := time.Duration(*d.ttl) * time.Second
	if p.Deadline.Remaining(b.o.Clock.Now()) >= ttl {
		return nil
	}
	return fmt.Errorf("grant %s, from which it derives, ends at %s, sooner than %v from now; renew that first, ask for less, or accept a narrower grant to end with it",
		p.ID, hostTime(p.Deadline.Wall).Format(time.RFC3339), ttl)
}

// least is the smaller of two limits, of which nil is none.
func least(a, b *int) *int {
	if a == nil || b != nil && *b < *a {
		return b
	}
	return a
}

// count is a limit that policy set, as the ledger counts.
func count(limit *int64) *int {
	if limit == nil {
		return nil
	}
	n := int(min(*limit, math.MaxInt32))
	return &n
}

// uncountable names the limits that count what nothing counts for the kind: a
// limit that cannot be kept refuses the grant, it is never dropped.
func (b *Broker) uncountable(l policy.Limits, kind string) []string {
	var out []string
	if l.MaxUses != nil && b.kinds.Use(kind) == "" {
		out = append(out, "max_uses")
	}
	for _, limit := range []struct {
		name string
		at   *int64
	}{{"max_live", l.MaxLive}, {"max_total", l.MaxTotal}} {
		if limit.at != nil {
			out = append(out, limit.name)
		}
	}
	return out
}

// delegatedShare is which part of the grants that a VM may hold another one may
// fill.
const delegatedShare = 4

// tooManyFrom refuses a VM that has delegated much to another one: what that may
// hold is not the first one's to fill.
func (b *Broker) tooManyFrom(s *ledger.State, actor ledger.Actor, holder uuid.UUID) error {
	if actor.Kind != ledger.ActorVM || actor.VM == holder {
		return nil
	}
	from := 0
	for _, g := range s.Grants(ledger.Filter{Holder: holder, States: liveStates}) {
		if g.Actor.Kind == ledger.ActorVM && g.Actor.VM == actor.VM {
			from++
		}
	}
	if most := max(1, b.o.MaxGrants/delegatedShare); from >= most {
		return api.Errorf(api.CodeNoSlots, "VM %s was delegated %d grants by VM %s already, as many as it may be by one", holder, from, actor.VM)
	}
	return nil
}

// inForce is how many grants a VM holds that are: not those that died with an
// ancestor, though that is not on record of them yet.
func inForce(s *ledger.State, vm uuid.UUID, now capabilities.Instant) int {
	n := 0
	for h := range s.Held(vm) {
		if h.State != ledger.Revoking && s.Live(h.ID, now) == nil {
			n++
		}
	}
	return n
}
