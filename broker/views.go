package broker

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"maps"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/applyfs"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/broker/reconcile"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/policy"
	"spectrum-os.org/broker/sources"
	"spectrum-os.org/broker/vmm/shim"
)

func apiCapability(c capabilities.Capability) api.Capability {
	resource, err := json.Marshal(c.Resource)
	if err != nil {
		resource = json.RawMessage("null")
	}
	return api.Capability{Kind: c.Kind, Resource: resource, Rights: c.Rights}
}

func apiVerdict(v policy.Verdict) api.Verdict {
	out := api.Verdict{Outcome: api.Outcome(v.Outcome), Summary: v.Summary(), Limits: api.Limits(v.Limits)}
	for _, a := range v.Answers {
		answer := api.Answer{
			Engine: a.Engine.String(), Name: a.Name, Outcome: api.Outcome(a.Outcome),
			Limits: api.Limits(a.Limits), Revision: a.Revision,
		}
		for _, r := range a.Reasons {
			answer.Reasons = append(answer.Reasons, api.Reason(r))
		}
		out.Answers = append(out.Answers, answer)
	}
	return out
}

// observedStates are the words people know for what was seen.
var observedStates = map[reconcile.Presence]string{
	reconcile.Present: "attached", reconcile.Arriving: "attaching", reconcile.Leaving: "detaching", reconcile.Gone: "gone",
}

// apiGrants are grants as people see them, with what each VM's objects are
// seen to be; every VM is asked once.
func (b *Broker) apiGrants(ctx context.Context, grants []ledger.Grant) []api.Grant {
	type sight struct {
		objects map[string]reconcile.Observed
		err     error
	}
	sights := map[uuid.UUID]sight{}
	out := make([]api.Grant, 0, len(grants))
	for _, g := range grants {
		g = b.shown(g)
		s, ok := sights[g.Holder]
		if !ok && !g.State.Final() {
			s.objects, s.err = b.reconciler.Sight(ctx, g.Holder)
			sights[g.Holder] = s
		}
		o := b.grantView(g)
		switch {
		case g.State.Final():
			o.Observed.State = "gone"
		case s.err != nil:
			o.Observed = api.Observed{State: "unknown", Detail: "the VM's shim does not answer"}
		default:
			o.Observed.State = "absent"
			for _, object := range b.reconciler.ObjectsOf(g) {
				if seen, ok := s.objects[object.ID]; ok {
					o.Observed = api.Observed{State: observedStates[seen.Presence], Detail: seen.Detail}
				}
			}
		}
		out = append(out, o)
	}
	return out
}

func (b *Broker) apiGrant(ctx context.Context, g ledger.Grant) api.Grant {
	return b.apiGrants(ctx, []ledger.Grant{g})[0]
}

func (b *Broker) grantView(g ledger.Grant) api.Grant {
	o := api.Grant{
		ID: g.ID, Holder: g.Holder, HolderName: b.vmName(g.Holder), Capability: apiCapability(g.Capability),
		Spelling: g.Capability.String(), Spoken: b.spoken(g.Capability), Label: g.Label, Depth: g.Depth,
		State: api.GrantState(g.State), Generation: g.Generation, Created: g.Created, Persist: g.Persist,
		Declared: g.Declared, MountPath: b.reconciler.Place(g), Reason: b.reconciler.Reason(g), Degraded: g.Degraded, Trouble: b.troubleOf(g),
		NoAgent: b.reconciler.Reason(g) == applyfs.NoAgent,
	}
	o.MaxDepth, o.MaxUses, o.Uses = g.Limits.MaxDepth, g.Limits.MaxUses, g.Uses
	if partition, ok := g.ResourcePartition(); ok {
		o.Partition = &partition
		o.PartitionName = b.petname(partition)
	}
	if g.Parent != uuid.Nil {
		o.Parent = &g.Parent
	}
	if !g.Deadline.IsZero() {
		o.Expires = &g.Deadline.Wall
	}
	if !g.Renewed.IsZero() {
		o.Renewed = &g.Renewed
	}
	if len(g.Decision) > 0 {
		var d recordedDecision
		if json.Unmarshal(g.Decision, &d) == nil {
			o.Decision, o.Narrowed = &d.Verdict, d.Narrowed
		}
	}
	return o
}

// vmView is a VM as people see it: its definition, and its unit if it runs.
func (b *Broker) vmView(vm uuid.UUID) api.VM {
	o := api.VM{ID: vm, Name: b.vmName(vm), State: api.VMStopped, Agent: api.Agent{State: api.AgentUnknown}}
	if d, ok := b.inv().definitions[vm]; ok {
		describe(&o, d)
	} else {
		o.Problem = "its definition is gone"
	}
	if o.Partition != nil {
		o.PartitionName = b.petname(*o.Partition)
	}
	b.ledger.View(func(s *ledger.State) {
		o.Grants = s.Count(ledger.Filter{Holder: vm, States: liveStates})
	})
	b.mu.Lock()
	u, busy := b.running[vm]
	b.mu.Unlock()
	if u == nil {
		if busy {
			o.State = api.VMStarting
		}
		return o
	}
	state, agent, started, stopping := u.snapshot()
	o.Instance, o.PID, o.ShimPID = state.Instance, state.VMMPid, state.ShimPid
	o.StartedAt, o.Agent = &started, agent
	o.Degraded, o.SlotsFree = state.Degraded, state.SlotsFree
	switch {
	case stopping || state.Phase == shim.Stopping || state.Phase == shim.Stopped:
		o.State = api.VMStopping
	case state.Phase == shim.Starting:
		o.State = api.VMStarting
	case len(state.Degraded) > 0:
		o.State = api.VMDegraded
	default:
		o.State = api.VMRunning
	}
	return o
}

func describe(o *api.VM, d sources.Definition) {
	o.Aliases, o.BuiltIn, o.Template, o.Role, o.Labels = d.Aliases, d.BuiltIn(), d.Template, d.Role, d.Labels
	if !d.BuiltIn() {
		o.Partition = &d.Partition
	}
}

func apiEvent(e ledger.Event) api.Event {
	o := api.Event{
		Seq: e.Seq, Time: e.Time, Type: string(e.Type), Data: e.Data,
		Actor: apiActor(e.Actor),
		Prev:  hex.EncodeToString(e.Prev[:]), Hash: hex.EncodeToString(e.Hash[:]),
	}
	for _, id := range []struct {
		from uuid.UUID
		to   **uuid.UUID
	}{{e.Grant, &o.Grant}, {e.VM, &o.VM}, {e.Partition, &o.Partition}} {
		if id.from != uuid.Nil {
			*id.to = &id.from
		}
	}
	return o
}

func (b *Broker) policyStatus() api.PolicyStatus {
	b.mu.Lock()
	failed, files := maps.Clone(b.policyErrors), maps.Clone(b.policyFiles)
	b.mu.Unlock()
	var out api.PolicyStatus
	have := map[policy.EngineID]bool{}
	for _, s := range b.engines.Status() {
		have[s.Engine] = true
		e := api.EngineStatus{
			Engine: s.Engine.String(), Name: b.engineName(s.Engine), State: "loaded", Revision: s.Revision,
			PID: s.PID, Decisions: s.Decisions, Failures: s.Restarts, Error: failed[s.Engine], Files: files[s.Engine],
		}
		if e.Error == "" {
			e.Error = s.LastError
		}
		if !s.LoadedAt.IsZero() {
			e.LoadedAt = &s.LoadedAt
		}
		switch {
		case s.Revision == "":
			e.State = "none"
		case failed[s.Engine] != "":
			e.State = "stale"
		}
		out.Engines = append(out.Engines, e)
	}
	for id, err := range failed {
		if !have[id] {
			out.Engines = append(out.Engines, api.EngineStatus{Engine: id.String(), Name: b.engineName(id), State: "none", Error: err})
		}
	}
	return out
}

func timeOr(t *time.Time) time.Time {
	if t == nil {
		return time.Time{}
	}
	return *t
}
