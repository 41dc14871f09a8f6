package broker

import (
	"context"
	"encoding/json"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/policy"
)

// Why implements api.Service.
func (b *Broker) Why(ctx context.Context, ref string) (api.Why, error) {
	g, err := b.resolveGrant(ref)
	if err != nil {
		return api.Why{}, err
	}
	var lineage []ledger.Grant
	live := map[uuid.UUID]error{}
	b.ledger.View(func(s *ledger.State) {
		lineage = s.Lineage(g.ID)
		for _, g := range lineage {
			live[g.ID] = b.reconciler.Live(s, g.ID)
		}
	})
	shown := b.apiGrants(ctx, lineage)
	var out api.Why
	for i, g := range lineage {
		step := api.WhyStep{Grant: shown[i], Actor: apiActor(g.Actor), Seq: g.Seq, Live: live[g.ID] == nil, Action: policy.ActionRequest}
		if err := live[g.ID]; err != nil {
			step.Dead = err.Error()
		}
		switch g.Actor.Kind {
		case ledger.ActorPerson:
			step.Action = policy.ActionGrant
		case ledger.ActorVM:
			step.ActorName = b.vmName(g.Actor.VM)
		}
		var parent *ledger.Grant
		if i+1 < len(lineage) {
			parent = &lineage[i+1]
			step.Action = actionOf(step.Action, parent, g.Holder)
		}
		b.nameRules(ctx, step.Grant.Decision, request{
			action: step.Action, actor: g.Actor, holder: g.Holder, capability: g.Capability, parent: parent,
			ttl: lifetime(g), at: decidedAt(g), limits: g.Limits,
		})
		out.Steps = append(out.Steps, step)
	}
	return out, nil
}

// nameRules adds to a recorded decision which rules allowed it. A yes is given
// without looking for them; policies are deterministic, so that the revision that
// decided tells them later, and where another one is in force nothing is added.
func (b *Broker) nameRules(ctx context.Context, d *api.Decision, r request) {
	if d == nil {
		return
	}
	again := apiVerdict(b.ask(ctx, r, true))
	for i := range d.Answers {
		a := &d.Answers[i]
		for _, now := range again.Answers {
			if now.Engine == a.Engine && now.Revision == a.Revision && now.Outcome == a.Outcome && len(a.Reasons) == 0 {
				a.Reasons = now.Reasons
			}
		}
	}
}

// decidedAt is when the decision was made that is on record of a grant.
func decidedAt(g ledger.Grant) time.Time {
	if !g.Renewed.IsZero() {
		return g.Renewed
	}
	return g.Created
}

// lifetime is how long a grant was last given for, in seconds, if it has an end.
func lifetime(g ledger.Grant) *int64 {
	if g.Deadline.IsZero() {
		return nil
	}
	ttl := lastLifetime(g)
	return &ttl
}

func apiActor(a ledger.Actor) api.Actor {
	out := api.Actor{Kind: a.Kind, UID: a.UID, PID: a.PID}
	if a.VM != uuid.Nil {
		out.VM = &a.VM
	}
	return out
}

// shown is a grant as it stands: one that died of itself or with an ancestor is
// being revoked, though that is not on record of it yet.
func (b *Broker) shown(g ledger.Grant) ledger.Grant {
	if g.State.Ended() {
		return g
	}
	var dead error
	b.ledger.View(func(s *ledger.State) { dead = b.reconciler.Live(s, g.ID) })
	if dead != nil {
		g.State, g.Reason = ledger.Revoking, dead.Error()
	}
	return g
}

// narrowed tells whether policy gave less than was asked.
func narrowed(g ledger.Grant) bool {
	var d recordedDecision
	return json.Unmarshal(g.Decision, &d) == nil && d.Narrowed
}
