package broker

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
)

var _ api.Service = (*Broker)(nil)

// Defaults of the waits that a caller does not bound.
const (
	defaultGrantWait  = 60 * time.Second
	defaultRevokeWait = 30 * time.Second
)

func actorOf(by api.Caller) ledger.Actor {
	if by.Kind == api.CallerVM {
		return ledger.Actor{Kind: ledger.ActorVM, VM: by.VM}
	}
	uid := by.UID
	return ledger.Actor{Kind: ledger.ActorPerson, UID: &uid, PID: int(by.PID)}
}

// bounded is ctx with the timeout that a caller asked for, in seconds.
func (b *Broker) bounded(ctx context.Context, seconds float64, otherwise time.Duration) (context.Context, context.CancelFunc) {
	d := b.o.stretched(otherwise)
	if seconds > 0 {
		d = time.Duration(min(seconds, 24*3600) * float64(time.Second))
	}
	return context.WithTimeout(ctx, d)
}

// Health implements api.Service.
func (b *Broker) Health(context.Context) api.Health {
	h := api.Health{Status: "ok", Version: b.o.Version, Ready: b.ready.Load(), PID: pid, StartedAt: b.started}
	b.ledger.View(func(s *ledger.State) { h.Epoch = s.Epoch() })
	for _, p := range b.inv().problems {
		h.Problems = append(h.Problems, p.String())
	}
	for _, e := range b.policyStatus().Engines {
		if e.State != "loaded" {
			h.Problems = append(h.Problems, fmt.Sprintf("the policy of %s is %s: %s", e.Name, e.State, e.Error))
		}
	}
	if n := b.reconciler.Troubles(); len(n) > 0 {
		h.Problems = append(h.Problems, fmt.Sprintf("%s; `spectrum-cap plan` shows them", troubleCount(n)))
	}
	if problems := b.ledgerProblems(); len(problems) > 0 {
		h.Status = "degraded"
		h.Problems = append(problems, h.Problems...)
	}
	if !h.Ready {
		h.Status = "starting"
	}
	return h
}

// ListVMs implements api.Service.
func (b *Broker) ListVMs(context.Context) ([]api.VM, error) {
	ids := map[uuid.UUID]bool{}
	for id := range b.inv().definitions {
		ids[id] = true
	}
	for id := range b.units() {
		ids[id] = true
	}
	out := make([]api.VM, 0, len(ids))
	for id := range ids {
		out = append(out, b.vmView(id))
	}
	slices.SortFunc(out, func(x, y api.VM) int { return strings.Compare(x.Name+x.ID.String(), y.Name+y.ID.String()) })
	return out, nil
}

// ShowVM implements api.Service.
func (b *Broker) ShowVM(_ context.Context, ref string) (api.VM, error) {
	vm, err := b.resolveVM(ref)
	if err != nil {
		return api.VM{}, err
	}
	return b.vmView(vm), nil
}

// StartVM implements api.Service.
func (b *Broker) StartVM(ctx context.Context, by api.Caller, ref string) (api.VM, error) {
	vm, err := b.resolveVM(ref)
	if err != nil {
		return api.VM{}, err
	}
	d, ok := b.inv().definitions[vm]
	if !ok {
		return api.VM{}, api.Errorf(api.CodeConflict, "the definition of VM %s is gone", vm)
	}
	if d.Template {
		return api.VM{}, api.Errorf(api.CodeConflict, "%s is a template: it describes disposables and is not started itself", b.vmName(vm))
	}
	// The VM belongs to the broker from here on: a caller that goes away does
	// not leave half of one.
	if _, err := b.startVM(context.WithoutCancel(ctx), actorOf(by), d); err != nil {
		if e, ok := asAPI(err); ok {
			return api.VM{}, e
		}
		return api.VM{}, api.Errorf(api.CodeConflict, "cannot start %s: %v", b.vmName(vm), err)
	}
	return b.vmView(vm), nil
}

// StopVM implements api.Service.
func (b *Broker) StopVM(ctx context.Context, by api.Caller, ref string, req api.StopRequest) (api.VM, error) {
	vm, err := b.resolveVM(ref)
	if err != nil {
		return api.VM{}, err
	}
	u := b.unit(vm)
	if u == nil {
		return api.VM{}, api.Errorf(api.CodeConflict, "VM %s does not run", b.vmName(vm))
	}
	grace := b.o.stretched(b.o.StopGrace)
	if req.GraceSeconds != nil {
		if *req.GraceSeconds < 0 || *req.GraceSeconds > 3600 {
			return api.VM{}, api.Errorf(api.CodeInvalid, "a grace of %v seconds is not between 0 and 3600", *req.GraceSeconds)
		}
		grace = time.Duration(*req.GraceSeconds * float64(time.Second))
	}
	ctx, cancel := context.WithTimeout(ctx, grace+b.o.stretched(15*time.Second))
	defer cancel()
	if err := b.stopVM(ctx, actorOf(by), u, grace); err != nil {
		return api.VM{}, err
	}
	return b.vmView(vm), nil
}

// Console implements api.Service.
func (b *Broker) Console(ctx context.Context, by api.Caller, ref string) (net.Conn, error) {
	vm, err := b.resolveVM(ref)
	if err != nil {
		return nil, err
	}
	u := b.unit(vm)
	if u == nil {
		return nil, api.Errorf(api.CodeConflict, "VM %s does not run", b.vmName(vm))
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", filepath.Join(u.dir, "console.sock"))
	if err != nil {
		return nil, api.Errorf(api.CodeUnavailable, "the console of %s is not there", b.vmName(vm)).WithCause(err)
	}
	_, err = b.ledger.Update(ctx, func(tx *ledger.Tx) error {
		partition, _ := tx.State().Binding(vm)
		return tx.Append(ledger.Event{Type: ledger.VMConsole, Actor: actorOf(by), VM: vm, Partition: partition})
	})
	if err != nil {
		_ = conn.Close()
		return nil, unrecorded("nobody is given the console", err)
	}
	return conn, nil
}

// Grant implements api.Service.
func (b *Broker) Grant(ctx context.Context, by api.Caller, req api.GrantRequest) (api.Grant, error) {
	r, err := b.fromPerson(by, req)
	if err != nil {
		return api.Grant{}, err
	}
	g, err := b.grant(ctx, r)
	if err != nil {
		return api.Grant{}, err
	}
	// A grant that persists waits for its VM to run.
	if req.Wait && b.unit(g.Holder) != nil {
		wait, cancel := b.bounded(ctx, req.TimeoutSeconds, defaultGrantWait)
		defer cancel()
		if g, err = b.outcome(wait, g); err != nil {
			return api.Grant{}, err
		}
	}
	return b.apiGrant(ctx, g), nil
}

// Explain implements api.Service.
func (b *Broker) Explain(ctx context.Context, by api.Caller, req api.GrantRequest) (api.Explanation, error) {
	out := api.Explanation{Request: req}
	r, err := b.fromPerson(by, req)
	if err != nil {
		return out, err
	}
	r.narrower = true
	d, err := b.decide(ctx, r, true)
	out.Verdict = apiVerdict(d.verdict)
	if err != nil {
		if len(d.verdict.Answers) > 0 {
			return out, nil // the refusal is the explanation
		}
		return out, err
	}
	effective := apiCapability(d.capability)
	out.Effective, out.Spelling = &effective, d.capability.String()
	if err := b.reconciler.Check(ctx, d.capability); err != nil {
		out.Actions = []string{fmt.Sprintf("refuse %s: %v", b.spoken(d.capability), err)}
		return out, nil
	}
	hypothetical := ledger.Grant{
		ID: uuid.New(), Holder: r.holder, Capability: d.capability, Generation: 1,
		State: ledger.Pending, Persist: true, Label: r.label,
	}
	if d.ttl != nil {
		hypothetical.Deadline = capabilities.NewDeadline(b.o.Clock.Now(), time.Duration(*d.ttl)*time.Second)
	}
	actions, err := b.reconciler.Preview(ctx, r.holder, hypothetical)
	if err != nil {
		return out, err
	}
	for _, a := range actions {
		out.Actions = append(out.Actions, a.String())
	}
	if len(actions) == 0 {
		out.Actions = []string{fmt.Sprintf("nothing until VM %s runs", b.vmName(r.holder))}
	}
	return out, nil
}

// ListGrants implements api.Service.
func (b *Broker) ListGrants(ctx context.Context, f api.GrantFilter) ([]api.Grant, error) {
	var filter ledger.Filter
	var err error
	if f.VM != "" {
		if filter.Holder, err = b.resolveVM(f.VM); err != nil {
			return nil, err
		}
	}
	if f.Partition != "" {
		if filter.ResourcePartition, err = b.resolvePartition(f.Partition); err != nil {
			return nil, err
		}
	}
	for _, s := range f.State {
		filter.States = append(filter.States, ledger.GrantState(s))
	}
	if len(filter.States) == 0 && !f.All {
		filter.States = []ledger.GrantState{ledger.Pending, ledger.Active, ledger.Revoking}
	}
	states := filter.States
	filter.States = recorded(states)
	selected, err := b.onResource(filter, f.Resource)
	if err != nil {
		return nil, err
	}
	var grants []ledger.Grant
	b.ledger.View(func(s *ledger.State) { grants = selected(s) })
	return b.apiGrants(ctx, b.inStates(grants, states)), nil
}

// onResource selects the grants that filter does, and of them, where a resource
// is spelt, those that reach into it: they give part of it, or it is part of what
// they give.
func (b *Broker) onResource(filter ledger.Filter, spelling string) (func(*ledger.State) []ledger.Grant, error) {
	if spelling == "" {
		return func(s *ledger.State) []ledger.Grant { return s.Grants(filter) }, nil
	}
	resource, err := b.kinds.Parse(spelling, resolver{b})
	if err != nil {
		return nil, invalid(err)
	}
	return func(s *ledger.State) []ledger.Grant {
		return slices.DeleteFunc(s.Grants(filter), func(g ledger.Grant) bool { return !b.kinds.Overlaps(resource, g.Capability) })
	}, nil
}

// ShowGrant implements api.Service.
func (b *Broker) ShowGrant(ctx context.Context, ref string) (api.Grant, error) {
	g, err := b.resolveGrant(ref)
	if err != nil {
		return api.Grant{}, err
	}
	return b.apiGrant(ctx, g), nil
}

// Token implements api.Service.
func (b *Broker) Token(ctx context.Context, by api.Caller, ref string) (api.Token, error) {
	g, err := b.resolveGrant(ref)
	if err != nil {
		return api.Token{}, err
	}
	return b.issue(ctx, actorOf(by), g)
}

// issue hands out the token of a grant, on record.
func (b *Broker) issue(ctx context.Context, actor ledger.Actor, g ledger.Grant) (api.Token, error) {
	var usable error
	b.ledger.View(func(s *ledger.State) {
		if usable = b.reconciler.Live(s, g.ID); usable == nil {
			usable = s.Spent(g.ID)
		}
	})
	if usable != nil {
		return api.Token{}, api.Errorf(api.CodeConflict, "grant %s has no token: %w", g.ID, usable)
	}
	text, kid, err := b.mint(ctx, actor, g)
	if err != nil {
		return api.Token{}, err
	}
	_, err = b.ledger.Update(ctx, func(tx *ledger.Tx) error {
		return tx.Append(ledger.Event{Type: ledger.TokenIssued, Actor: actor, Grant: g.ID, Data: ledger.JSON(ledger.IssuedData{KID: kid})})
	})
	if err != nil {
		return api.Token{}, unrecorded("no token is handed out", err)
	}
	return api.Token{Grant: g.ID, Token: text}, nil
}

// ReloadPolicy implements api.Service.
func (b *Broker) ReloadPolicy(ctx context.Context, by api.Caller) (api.PolicyStatus, error) {
	if err := b.loadPolicies(context.WithoutCancel(ctx), actorOf(by)); err != nil {
		return api.PolicyStatus{}, unrecorded("which policy is in force is not on record", err)
	}
	return b.policyStatus(), nil
}

// PolicyStatus implements api.Service.
func (b *Broker) PolicyStatus(context.Context) (api.PolicyStatus, error) {
	return b.policyStatus(), nil
}

// ListNames implements api.Service.
func (b *Broker) ListNames(context.Context) ([]api.Name, error) {
	var out []api.Name
	b.ledger.View(func(s *ledger.State) {
		for id, name := range s.Names() {
			out = append(out, api.Name{Name: name, Partition: id})
		}
	})
	slices.SortFunc(out, func(x, y api.Name) int { return strings.Compare(x.Name, y.Name) })
	return out, nil
}

// A petname never looks like a UUID's first digits, and has no character that
// separates the parts of a spelling.
var petnamePattern = regexp.MustCompile(`^[a-z][a-z0-9._-]{0,62}$`)

var hexOnly = regexp.MustCompile(`^[0-9a-f-]{8,}$`)

// SetName implements api.Service.
func (b *Broker) SetName(ctx context.Context, by api.Caller, name string, partition uuid.UUID) (api.Name, error) {
	if !petnamePattern.MatchString(name) || hexOnly.MatchString(name) || name == builtinName || name == selfName || name == "host" {
		return api.Name{}, api.Errorf(api.CodeInvalid,
			"%q cannot name a partition: a name is [a-z][a-z0-9._-]*, at most 63 long, not like a UUID, and none of builtin, host and self", name)
	}
	if _, ok := b.Partition(partition); !ok {
		return api.Name{}, api.Errorf(api.CodeNotFound, "there is no partition %s; `spectrum-cap partition list` shows them", partition)
	}
	return api.Name{Name: name, Partition: partition}, b.rename(ctx, by, ledger.NameSet, func(names map[uuid.UUID]string) (uuid.UUID, string, error) {
		for id, n := range names {
			if n == name && id != partition {
				return uuid.Nil, "", api.Errorf(api.CodeConflict, "partition %s is named %q already", id, name)
			}
		}
		return partition, name, nil
	})
}

// RemoveName implements api.Service.
func (b *Broker) RemoveName(ctx context.Context, by api.Caller, name string) error {
	return b.rename(ctx, by, ledger.NameRemoved, func(names map[uuid.UUID]string) (uuid.UUID, string, error) {
		for id, n := range names {
			if n == name {
				return id, name, nil
			}
		}
		return uuid.Nil, "", api.Errorf(api.CodeNotFound, "no partition is named %q", name)
	})
}

func (b *Broker) rename(ctx context.Context, by api.Caller, t ledger.EventType, which func(map[uuid.UUID]string) (uuid.UUID, string, error)) error {
	_, err := b.ledger.Update(ctx, func(tx *ledger.Tx) error {
		partition, name, err := which(tx.State().Names())
		if err != nil {
			return err
		}
		return tx.Append(ledger.Event{Type: t, Actor: actorOf(by), Partition: partition, Data: ledger.JSON(ledger.NameData{Name: name})})
	})
	if _, ok := asAPI(err); err == nil || ok {
		return err
	}
	return uncertain("the name is unchanged", err)
}

// ListPartitions implements api.Service.
func (b *Broker) ListPartitions(context.Context) ([]api.Partition, error) {
	inv := b.inv()
	ids := map[uuid.UUID]bool{}
	for id := range inv.partitions {
		ids[id] = true
	}
	b.ledger.View(func(s *ledger.State) {
		for id := range s.Names() {
			ids[id] = true
		}
	})
	policies := map[string]string{}
	for _, e := range b.policyStatus().Engines {
		policies[e.Engine] = e.State
	}
	out := make([]api.Partition, 0, len(ids))
	for id := range ids {
		p, present := inv.partitions[id]
		o := api.Partition{ID: id, Present: present, Dir: string(p.Dir), Writable: p.Writable, Policy: policies[id.String()]}
		if o.Policy == "" {
			o.Policy = "none"
		}
		for _, d := range inv.definitions {
			if d.Partition == id {
				o.VMs++
			}
		}
		for _, problem := range inv.problems {
			if problem.Partition == id {
				o.Problems = append(o.Problems, problem.String())
			}
		}
		b.ledger.View(func(s *ledger.State) {
			o.Name = s.Names()[id]
			o.Grants = s.Count(ledger.Filter{ResourcePartition: id, States: liveStates})
		})
		out = append(out, o)
	}
	slices.SortFunc(out, func(x, y api.Partition) int { return strings.Compare(x.ID.String(), y.ID.String()) })
	return out, nil
}
