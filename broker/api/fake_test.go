package api_test

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
)

// fake is a broker in memory: VMs start and stop, grants are made, found by
// prefix, derived and revoked with their subtree, names resolve, and every
// change is an event.
type fake struct {
	mu     sync.Mutex
	vms    []api.VM
	grants []api.Grant
	names  map[string]uuid.UUID
	events []api.Event
	scan   uint64 // how many of them a page looks at; 0: all
	wakers map[chan struct{}]bool
	calls  map[string]int
	by     []api.Caller

	fail   error                           // what every call fails with, if set
	delay  func(ctx context.Context)       // runs inside Grant and Request
	cut    bool                            // revocations are confirmed at once
	refs   []string                        // references that came in
	query  []api.EventQuery                // queries that came in
	verify []api.VerifyQuery               // likewise
	last   api.RevokeRequest               // the last one
	token  map[string]map[string]uuid.UUID // vm → token → grant
}

var (
	partition = uuid.MustParse("11111111-1111-4111-8111-111111111111")
	mailVM    = uuid.MustParse("22222222-2222-4222-8222-222222222222")
	otherVM   = uuid.MustParse("33333333-3333-4333-8333-333333333333")
	epoch     = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
)

func newFake() *fake {
	return &fake{
		vms: []api.VM{
			{ID: mailVM, Name: "work/mail", Aliases: []string{"mail"}, Partition: &partition, PartitionName: "work", State: api.VMStopped, Agent: api.Agent{State: api.AgentUnknown}},
			{ID: otherVM, Name: "home/mail", Aliases: []string{"mail"}, State: api.VMStopped, Agent: api.Agent{State: api.AgentUnknown}, Labels: map[string]string{"a": "b"}},
		},
		names:  map[string]uuid.UUID{"work": partition},
		wakers: map[chan struct{}]bool{},
		calls:  map[string]int{},
		token:  map[string]map[string]uuid.UUID{},
		cut:    true,
	}
}

// enter counts a call and says whether it is to fail. The caller unlocks.
func (f *fake) enter(name string, by ...api.Caller) error {
	f.mu.Lock()
	f.calls[name]++
	f.by = append(f.by, by...)
	return f.fail
}

func (f *fake) count(name string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[name]
}

func (f *fake) record(kind string, by api.Caller, grant *uuid.UUID) {
	seq := uint64(len(f.events) + 1)
	a := api.Actor{Kind: by.Kind, PID: int(by.PID)}
	if by.Kind == api.CallerPerson {
		a.UID = &by.UID
	} else {
		a.VM = &by.VM
	}
	f.events = append(f.events, api.Event{
		Seq: seq, Time: epoch.Add(time.Duration(seq) * time.Second), Type: kind, Actor: a, Grant: grant,
		Data: json.RawMessage(`{"n":1}`), Prev: hex.EncodeToString(make([]byte, 32)), Hash: hex.EncodeToString(make([]byte, 32)),
	})
	for w := range f.wakers {
		select {
		case w <- struct{}{}:
		default:
		}
	}
}

func (f *fake) emit(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for range n {
		f.record("vm.started", api.Caller{Kind: api.CallerPerson}, nil)
	}
}

func (f *fake) findVM(ref string) (*api.VM, error) {
	f.refs = append(f.refs, ref)
	var hits []*api.VM
	for i := range f.vms {
		v := &f.vms[i]
		if v.Name == ref || slices.Contains(v.Aliases, ref) || len(ref) >= 8 && strings.HasPrefix(v.ID.String(), ref) {
			hits = append(hits, v)
		}
	}
	switch len(hits) {
	case 0:
		return nil, api.Errorf(api.CodeNotFound, "there is no VM %q", ref)
	case 1:
		return hits[0], nil
	}
	e := api.Errorf(api.CodeAmbiguous, "%q names several VMs", ref)
	for _, h := range hits {
		e.Candidates = append(e.Candidates, h.Name)
	}
	return nil, e
}

func (f *fake) findGrant(ref string) (*api.Grant, error) {
	for i := range f.grants {
		if len(ref) >= 8 && strings.HasPrefix(f.grants[i].ID.String(), ref) {
			return &f.grants[i], nil
		}
	}
	return nil, api.Errorf(api.CodeNotFound, "there is no grant %q", ref)
}

func (f *fake) Health(context.Context) api.Health {
	return api.Health{Status: "ok", Version: "test", Ready: true, PID: 1, StartedAt: epoch, Epoch: 1}
}

func (f *fake) ListVMs(context.Context) ([]api.VM, error) {
	err := f.enter("ListVMs")
	defer f.mu.Unlock()
	return slices.Clone(f.vms), err
}

func (f *fake) withVM(name, ref string, by api.Caller, do func(*api.VM)) (api.VM, error) {
	err := f.enter(name, by)
	defer f.mu.Unlock()
	if err != nil {
		return api.VM{}, err
	}
	v, err := f.findVM(ref)
	if err != nil {
		return api.VM{}, err
	}
	do(v)
	return *v, nil
}

func (f *fake) ShowVM(_ context.Context, ref string) (api.VM, error) {
	return f.withVM("ShowVM", ref, api.Caller{}, func(*api.VM) {})
}

func (f *fake) StartVM(_ context.Context, by api.Caller, ref string) (api.VM, error) {
	return f.withVM("StartVM", ref, by, func(v *api.VM) {
		v.State, v.PID, v.ShimPID, v.StartedAt, v.Instance = api.VMRunning, 10, 11, &epoch, "i1"
		f.record("vm.started", by, nil)
	})
}

func (f *fake) StopVM(_ context.Context, by api.Caller, ref string, _ api.StopRequest) (api.VM, error) {
	return f.withVM("StopVM", ref, by, func(v *api.VM) {
		v.State, v.PID, v.ShimPID, v.StartedAt, v.Instance = api.VMStopped, 0, 0, nil, ""
		f.record("vm.exited", by, nil)
	})
}

// Console echoes in upper case.
func (f *fake) Console(_ context.Context, by api.Caller, ref string) (net.Conn, error) {
	if _, err := f.withVM("Console", ref, by, func(*api.VM) {}); err != nil {
		return nil, err
	}
	a, b := net.Pipe()
	go func() {
		defer b.Close()
		buf := make([]byte, 256)
		for {
			n, err := b.Read(buf)
			if err != nil {
				return
			}
			if _, err := io.WriteString(b, strings.ToUpper(string(buf[:n]))); err != nil {
				return
			}
		}
	}()
	return a, nil
}

func (f *fake) make(holder uuid.UUID, spelling, label string) (api.Grant, error) {
	parts := strings.SplitN(spelling, ":", 4)
	if len(parts) != 4 || parts[0] != "fs" {
		return api.Grant{}, api.Errorf(api.CodeInvalid, "cannot parse %q", spelling)
	}
	if strings.Contains(parts[3], "secret") {
		e := api.Errorf(api.CodeDenied, "host policy: no secrets")
		e.Verdict = &api.Verdict{Outcome: api.OutcomeDeny, Summary: "no secrets (deny at host.rego:7)", Answers: []api.Answer{{
			Engine: "host", Outcome: api.OutcomeDeny, Reasons: []api.Reason{{Text: "no secrets", Rule: "deny", File: "host.rego", Line: 7, Kind: "deny"}}, Revision: "r1",
		}}}
		return api.Grant{}, e
	}
	g := api.Grant{
		ID: uuid.New(), Holder: holder, HolderName: "work/mail", Partition: &partition, PartitionName: "work",
		Capability: api.Capability{Kind: "fs", Resource: json.RawMessage(`{"partition":"` + partition.String() + `","path":"` + parts[3] + `"}`), Rights: []string{"read"}},
		Spelling:   "fs:ro:" + partition.String() + ":" + parts[3], Spoken: spelling, Label: label, State: api.GrantActive, Generation: 1, Created: epoch,
		Observed: api.Observed{State: "attached"}, MountPath: "/run/spectrum/fs/" + label, Decision: &api.Decision{Outcome: api.OutcomeAllow},
	}
	f.grants = append(f.grants, g)
	return g, nil
}

func (f *fake) Grant(ctx context.Context, by api.Caller, r api.GrantRequest) (api.Grant, error) {
	err := f.enter("Grant", by)
	delay := f.delay
	f.mu.Unlock()
	if delay != nil {
		delay(ctx)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return api.Grant{}, err
	}
	v, err := f.findVM(r.VM)
	if err != nil {
		return api.Grant{}, err
	}
	g, err := f.make(v.ID, r.Capability, r.Label)
	if err != nil {
		return api.Grant{}, err
	}
	f.record("grant.active", by, &g.ID)
	return g, nil
}

func (f *fake) ListGrants(_ context.Context, q api.GrantFilter) ([]api.Grant, error) {
	err := f.enter("ListGrants")
	defer f.mu.Unlock()
	var out []api.Grant
	for _, g := range f.grants {
		ended := g.State == api.GrantRevoked || g.State == api.GrantFailed
		if len(q.State) > 0 && !slices.Contains(q.State, g.State) || len(q.State) == 0 && ended && !q.All {
			continue
		}
		if q.VM != "" && g.Holder.String() != q.VM && g.HolderName != q.VM {
			continue
		}
		out = append(out, g)
	}
	return out, err
}

func (f *fake) ShowGrant(_ context.Context, ref string) (api.Grant, error) {
	err := f.enter("ShowGrant")
	defer f.mu.Unlock()
	if err != nil {
		return api.Grant{}, err
	}
	g, err := f.findGrant(ref)
	if err != nil {
		return api.Grant{}, err
	}
	return *g, nil
}

func (f *fake) Revoke(_ context.Context, by api.Caller, r api.RevokeRequest) (res api.RevokeResult, err error) {
	err = f.enter("Revoke", by)
	defer f.mu.Unlock()
	if err != nil {
		return res, err
	}
	f.last = r
	for i := range f.grants {
		g := &f.grants[i]
		hit := r.All || r.VM != "" && g.HolderName == r.VM || slices.ContainsFunc(r.IDs, func(id string) bool { return strings.HasPrefix(g.ID.String(), id) })
		if !hit || g.State == api.GrantRevoked {
			continue
		}
		if f.cut {
			g.State, g.Observed.State = api.GrantRevoked, "gone"
			res.Revoked = append(res.Revoked, *g)
		} else {
			g.State, g.Observed.State = api.GrantRevoking, "detaching"
			res.Revoking = append(res.Revoking, *g)
		}
		f.record("grant."+string(g.State), by, &g.ID)
	}
	if len(r.IDs) > 0 && len(res.Revoked)+len(res.Revoking) == 0 {
		return res, api.Errorf(api.CodeNotFound, "there is no grant %q", r.IDs[0])
	}
	return res, nil
}

func (f *fake) Renew(_ context.Context, by api.Caller, ref string, r api.RenewRequest) (api.Grant, error) {
	err := f.enter("Renew", by)
	defer f.mu.Unlock()
	if err != nil {
		return api.Grant{}, err
	}
	g, err := f.findGrant(ref)
	if err != nil {
		return api.Grant{}, err
	}
	until, at := epoch, epoch
	if r.TTLSeconds != nil {
		until = epoch.Add(time.Duration(*r.TTLSeconds) * time.Second)
	}
	g.Expires, g.Renewed = &until, &at
	return *g, nil
}

func (f *fake) Token(_ context.Context, by api.Caller, ref string) (api.Token, error) {
	err := f.enter("Token", by)
	defer f.mu.Unlock()
	if err != nil {
		return api.Token{}, err
	}
	g, err := f.findGrant(ref)
	if err != nil {
		return api.Token{}, err
	}
	return api.Token{Grant: g.ID, Token: "c2VjcmV0-" + strings.ReplaceAll(g.ID.String(), "-", "_")}, nil
}

func (f *fake) Explain(_ context.Context, by api.Caller, r api.GrantRequest) (api.Explanation, error) {
	err := f.enter("Explain", by)
	defer f.mu.Unlock()
	return api.Explanation{
		Request: r, Verdict: api.Verdict{Outcome: api.OutcomeAllow, Answers: []api.Answer{{Engine: "host", Outcome: api.OutcomeAllow}}},
		Effective: &api.Capability{Kind: "fs", Resource: json.RawMessage(`{}`), Rights: []string{"read"}}, Actions: []string{"attach"},
	}, err
}

func (f *fake) ReloadPolicy(_ context.Context, by api.Caller) (api.PolicyStatus, error) {
	err := f.enter("ReloadPolicy", by)
	defer f.mu.Unlock()
	return api.PolicyStatus{Engines: []api.EngineStatus{{Engine: "host", State: "loaded", Revision: "r1", LoadedAt: &epoch}}}, err
}

func (f *fake) PolicyStatus(context.Context) (api.PolicyStatus, error) {
	err := f.enter("PolicyStatus")
	defer f.mu.Unlock()
	return api.PolicyStatus{}, err
}

func (f *fake) ListNames(context.Context) (out []api.Name, err error) {
	err = f.enter("ListNames")
	defer f.mu.Unlock()
	for n, p := range f.names {
		out = append(out, api.Name{Name: n, Partition: p})
	}
	slices.SortFunc(out, func(a, b api.Name) int { return strings.Compare(a.Name, b.Name) })
	return out, err
}

func (f *fake) SetName(_ context.Context, by api.Caller, name string, p uuid.UUID) (api.Name, error) {
	err := f.enter("SetName", by)
	defer f.mu.Unlock()
	f.names[name] = p
	return api.Name{Name: name, Partition: p}, err
}

func (f *fake) RemoveName(_ context.Context, by api.Caller, name string) error {
	err := f.enter("RemoveName", by)
	defer f.mu.Unlock()
	if _, is := f.names[name]; !is && err == nil {
		return api.Errorf(api.CodeNotFound, "there is no name %q", name)
	}
	delete(f.names, name)
	return err
}

func (f *fake) ListPartitions(context.Context) ([]api.Partition, error) {
	err := f.enter("ListPartitions")
	defer f.mu.Unlock()
	return []api.Partition{{ID: partition, Name: "work", Present: true, Policy: "loaded"}}, err
}

func (f *fake) Events(_ context.Context, q api.EventQuery) (api.EventList, error) {
	err := f.enter("Events")
	defer f.mu.Unlock()
	f.query = append(f.query, q)
	out := api.EventList{Next: q.After}
	for _, e := range f.events {
		if e.Seq <= q.After {
			continue
		}
		if len(out.Events) >= q.Limit || f.scan > 0 && e.Seq > q.After+f.scan {
			out.More = true
			break
		}
		out.Next = e.Seq
		if len(q.Types) == 0 || slices.Contains(q.Types, e.Type) {
			out.Events = append(out.Events, e)
		}
	}
	return out, err
}

func (f *fake) EventsWake(ctx context.Context) <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	w := make(chan struct{}, 1)
	f.wakers[w] = true
	context.AfterFunc(ctx, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.wakers, w)
	})
	return w
}

func (f *fake) VerifyAudit(_ context.Context, q api.VerifyQuery) (api.AuditReport, error) {
	err := f.enter("VerifyAudit")
	defer f.mu.Unlock()
	f.verify = append(f.verify, q)
	return api.AuditReport{
		Events: len(f.events), First: 1, Last: uint64(len(f.events)), Head: hex.EncodeToString(make([]byte, 32)),
		Anchors: len(q.Anchors), Broken: &api.BrokenChain{Seq: 3, Problem: "the hash differs"},
	}, err
}

func (f *fake) RotateAudit(_ context.Context, by api.Caller) (api.Rotation, error) {
	err := f.enter("RotateAudit")
	defer f.mu.Unlock()
	f.by = append(f.by, by)
	return api.Rotation{
		Archive: api.Archive{Name: "ledger-1-3-00000000.db", First: 1, Last: 3}, Path: "/state/archive/ledger-1-3-00000000.db",
		Bytes: 4096, First: 4, Grants: 2, BlockedSeconds: 0.5,
	}, err
}

// guestFake is the same broker seen by guests.
type guestFake struct{ *fake }

func (f guestFake) Self(_ context.Context, vm uuid.UUID) (api.Self, error) {
	return api.Self{ID: vm, Partition: &partition, Role: "app", Instance: "i1", Now: epoch}, f.fail
}

func guestView(g api.Grant) api.GuestGrant {
	return api.GuestGrant{
		ID: g.ID, Capability: g.Capability, Spelling: g.Spelling, Label: g.Label, State: g.State, Created: g.Created, MountPath: g.MountPath,
	}
}

func (f guestFake) Capabilities(_ context.Context, vm uuid.UUID) (out []api.GuestGrant, err error) {
	err = f.enter("Capabilities")
	defer f.mu.Unlock()
	for _, g := range f.grants {
		if g.Holder == vm && g.State != api.GrantRevoked {
			out = append(out, guestView(g))
		}
	}
	return out, err
}

func (f guestFake) tokens(vm uuid.UUID) map[string]uuid.UUID {
	m := f.token[vm.String()]
	if m == nil {
		m = map[string]uuid.UUID{}
		f.token[vm.String()] = m
	}
	return m
}

func (f guestFake) Request(ctx context.Context, vm uuid.UUID, r api.GuestRequest) (api.GuestGrant, error) {
	err := f.enter("Request")
	delay := f.delay
	f.mu.Unlock()
	if delay != nil {
		delay(ctx)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case err != nil:
		return api.GuestGrant{}, err
	case r.Parent != "" && f.tokens(vm)[r.Parent] == uuid.Nil:
		return api.GuestGrant{}, api.Errorf(api.CodeTokenRefused, "token of %s presented by %s", otherVM, vm).WithCause(errors.New("wrong holder"))
	}
	parts := strings.SplitN(r.Capability, ":", 4)
	if len(parts) == 4 && parts[2] != "self" && parts[2] != partition.String() {
		if _, known := f.names[parts[2]]; !known {
			return api.GuestGrant{}, api.Errorf(api.CodeNotFound, "there is no partition %q", parts[2])
		}
		return api.GuestGrant{}, &api.Error{Code: api.CodeDenied, Detail: "denied by work's policy", Verdict: &api.Verdict{Outcome: api.OutcomeDeny}}
	}
	g, err := f.make(vm, r.Capability, r.Label)
	if err != nil {
		return api.GuestGrant{}, err
	}
	view := guestView(g)
	view.Token = "dG9rZW4" + strings.ReplaceAll(g.ID.String(), "-", "_")
	f.tokens(vm)[view.Token] = g.ID
	return view, nil
}

func (f guestFake) Drop(_ context.Context, vm, id uuid.UUID, token string) (api.GuestGrant, error) {
	err := f.enter("Drop")
	defer f.mu.Unlock()
	if err != nil {
		return api.GuestGrant{}, err
	}
	if token != "" {
		of := f.tokens(vm)[token]
		if of == uuid.Nil || id != uuid.Nil && id != of {
			return api.GuestGrant{}, api.Errorf(api.CodeTokenRefused, "not the holder's")
		}
		id = of
	}
	for i := range f.grants {
		g := &f.grants[i]
		if g.ID != id {
			continue
		}
		if g.Holder != vm {
			return api.GuestGrant{}, api.Errorf(api.CodeDenied, "grant %s is %s's", id, g.Holder)
		}
		g.State = api.GrantRevoked
		if !f.cut {
			g.State = api.GrantRevoking
		}
		return guestView(*g), nil
	}
	return api.GuestGrant{}, api.Errorf(api.CodeNotFound, "there is no grant %s", id)
}

var (
	_ api.Service      = (*fake)(nil)
	_ api.GuestService = guestFake{}
)
