package cli_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
)

var (
	work    = uuid.MustParse("11111111-1111-4111-8111-111111111111")
	private = uuid.MustParse("11111111-2222-4222-8222-222222222222")
	workVM  = uuid.MustParse("aaaaaaaa-0000-4000-8000-000000000001")
	webVM   = uuid.MustParse("aaaaaaaa-0000-4000-8000-000000000002")
	privVM  = uuid.MustParse("bbbbbbbb-0000-4000-8000-000000000003")
	netVM   = uuid.MustParse("cccccccc-0000-4000-8000-000000000004")
)

// fake is a broker in memory: VMs start and stop, references are resolved,
// grants are decided by where their path leads, derived, and revoked with
// their subtree, and every change is an event.
//
// Its policy: /secret is denied, /broken cannot be decided, /narrow is for
// reading only, /slow takes too long, /full finds no slot, /busy is tried again. work/web has no
// agent, and private/mail is a VM whose guest does not let go.
type fake struct {
	mu     sync.Mutex
	vms    []api.VM
	grants []*api.Grant
	names  map[string]uuid.UUID
	events []api.Event
	// records are the events', in order, where a test gives them
	records [][]byte
	wakers  map[chan struct{}]bool
	keys    []api.Key
	// keyFrom is how many grants there were when each key became current.
	keyFrom []int
	broken  bool // the audit's chain
}

func newFake() *fake {
	vm := func(id uuid.UUID, name string, partition *uuid.UUID) api.VM {
		p, _, _ := strings.Cut(name, "/")
		v := api.VM{
			ID: id, Name: name, Partition: partition, PartitionName: p, BuiltIn: partition == nil,
			Role: "app", State: api.VMStopped, Agent: api.Agent{State: api.AgentUnknown},
		}
		if v.BuiltIn {
			v.PartitionName, v.Role = "", "net"
		}
		return v
	}
	f := &fake{
		vms: []api.VM{
			vm(workVM, "work/mail", &work), vm(webVM, "work/web", &work),
			vm(privVM, "private/mail", &private), vm(netVM, "builtin/net", nil),
		},
		names:  map[string]uuid.UUID{"work": work, "private": private},
		wakers: map[chan struct{}]bool{},
	}
	f.vms[0].Labels = map[string]string{"tier": "low"}
	f.record("ledger.created", nil, nil, `{"epoch":1}`)
	return f
}

func (f *fake) record(typ string, vm, grant *uuid.UUID, data string) {
	e := api.Event{
		Seq: uint64(len(f.events) + 1), Time: time.Now(), Type: typ, VM: vm, Grant: grant, Data: json.RawMessage(data),
		Actor: api.Actor{Kind: "broker"}, Prev: strings.Repeat("0", 64), Hash: strings.Repeat("0", 64),
	}
	f.events = append(f.events, e)
	for w := range f.wakers {
		select {
		case w <- struct{}{}:
		default:
		}
	}
}

func (f *fake) Health(context.Context) api.Health {
	return api.Health{Status: "ok", Version: "test", Ready: true, PID: 4711, StartedAt: time.Now(), Epoch: 1}
}

func (f *fake) vm(ref string) (*api.VM, error) {
	var fit []*api.VM
	for i := range f.vms {
		v := &f.vms[i]
		_, alias, _ := strings.Cut(v.Name, "/")
		if ref == v.Name || ref == alias || len(ref) >= 8 && strings.HasPrefix(v.ID.String(), ref) {
			fit = append(fit, v)
		}
	}
	switch len(fit) {
	case 0:
		return nil, api.Errorf(api.CodeNotFound, "there is no VM %q", ref)
	case 1:
		return fit[0], nil
	}
	e := api.Errorf(api.CodeAmbiguous, "%q fits several VMs", ref)
	for _, v := range fit {
		e.Candidates = append(e.Candidates, v.Name)
	}
	return nil, e
}

func (f *fake) ListVMs(context.Context) ([]api.VM, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.vms), nil
}

func (f *fake) ShowVM(_ context.Context, ref string) (api.VM, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v, err := f.vm(ref)
	if err != nil {
		return api.VM{}, err
	}
	return *v, nil
}

func (f *fake) StartVM(_ context.Context, _ api.Caller, ref string) (api.VM, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v, err := f.vm(ref)
	if err != nil {
		return api.VM{}, err
	}
	if v.State == api.VMRunning {
		return api.VM{}, api.Errorf(api.CodeConflict, "%s runs already", v.Name)
	}
	now := time.Now()
	v.State, v.PID, v.ShimPID, v.StartedAt, v.SlotsFree = api.VMRunning, 101, 100, &now, 140
	v.Agent = api.Agent{State: api.AgentHealthy, Version: "1"}
	if v.ID == webVM {
		v.Agent = api.Agent{State: api.AgentAbsent, Detail: "silent \x1b[2J"}
	}
	f.record("vm.started", &v.ID, nil, `{"instance":"i-1"}`)
	return *v, nil
}

func (f *fake) StopVM(_ context.Context, _ api.Caller, ref string, r api.StopRequest) (api.VM, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v, err := f.vm(ref)
	if err != nil {
		return api.VM{}, err
	}
	reason := "asked to"
	if r.GraceSeconds != nil {
		reason = fmt.Sprintf("asked to within %g s", *r.GraceSeconds)
	}
	v.State, v.PID, v.ShimPID, v.StartedAt = api.VMStopped, 0, 0, nil
	for _, g := range f.grants {
		if g.Holder == v.ID && !g.Persist {
			f.end(g)
		}
	}
	f.record("vm.exited", &v.ID, nil, fmt.Sprintf(`{"reason":%q}`, reason))
	return *v, nil
}

func (f *fake) Console(_ context.Context, _ api.Caller, ref string) (net.Conn, error) {
	f.mu.Lock()
	v, err := f.vm(ref)
	f.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if v.State != api.VMRunning {
		return nil, api.Errorf(api.CodeConflict, "%s does not run", v.Name)
	}
	ours, theirs := net.Pipe()
	go func() {
		defer ours.Close()
		_, _ = io.WriteString(ours, "login: ")
		for s := bufio.NewScanner(ours); s.Scan() && s.Text() != "exit"; {
			_, _ = fmt.Fprintf(ours, "you said %s\n", s.Text())
		}
	}()
	return theirs, nil
}

// capability reads a spelling; the form is the broker's matter.
func (f *fake) capability(spelling string) (c api.Capability, partition uuid.UUID, path string, err error) {
	parts := strings.SplitN(spelling, ":", 4)
	if len(parts) != 4 || parts[0] != "fs" || !strings.HasPrefix(parts[3], "/") {
		return c, uuid.Nil, "", api.Errorf(api.CodeInvalid, "%q is not the spelling of a capability", spelling)
	}
	partition, named := f.names[parts[2]]
	if !named {
		if partition, err = uuid.Parse(parts[2]); err != nil {
			return c, uuid.Nil, "", api.Errorf(api.CodeNotFound, "there is no partition %q", parts[2])
		}
	}
	rights := []string{"read"}
	if parts[1] == "rw" {
		rights = append(rights, "write")
	}
	resource, _ := json.Marshal(map[string]string{"partition": partition.String(), "path": parts[3]})
	return api.Capability{Kind: "fs", Resource: resource, Rights: rights}, partition, parts[3], nil
}

func verdict(outcome api.Outcome, path string) api.Verdict {
	v := api.Verdict{Outcome: outcome, Summary: "host and work allow it"}
	host := api.Answer{Engine: "host", Outcome: api.OutcomeAllow, Reasons: []api.Reason{{Text: "allow", Kind: "allow", Rule: "allow", File: "/etc/spectrum-broker/policy/host.rego", Line: 7}}}
	part := api.Answer{Engine: work.String(), Name: "work", Outcome: outcome, Revision: "r1"}
	switch outcome {
	case api.OutcomeDeny:
		v.Summary = "work denies it"
		part.Reasons = []api.Reason{{Text: path + " is nobody's business", Kind: "deny", Rule: "deny", File: "svc/policy/work.rego", Line: 12}}
	case api.OutcomeError:
		v.Summary = "work cannot decide"
		part.Reasons = []api.Reason{{Text: "eval_conflict_error", Kind: "error", File: "svc/policy/work.rego", Line: 3}}
	default:
		part.Reasons = []api.Reason{{Text: "allow", Kind: "allow", Rule: "allow", File: "svc/policy/work.rego", Line: 5}}
	}
	if strings.HasPrefix(path, "/narrow") {
		ttl := int64(60)
		part.Limits = api.Limits{ReadOnly: true, TTLSeconds: &ttl}
		v.Limits = part.Limits
	}
	v.Answers = []api.Answer{host, part}
	return v
}

func outcome(path string) api.Outcome {
	switch {
	case strings.HasPrefix(path, "/secret"):
		return api.OutcomeDeny
	case strings.HasPrefix(path, "/broken"):
		return api.OutcomeError
	}
	return api.OutcomeAllow
}

func (f *fake) Grant(_ context.Context, by api.Caller, r api.GrantRequest) (api.Grant, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v, err := f.vm(r.VM)
	if err != nil {
		return api.Grant{}, err
	}
	if r.Capability == "" {
		parent, err := f.grant(r.Parent)
		if err != nil {
			return api.Grant{}, err
		}
		r.Capability = parent.Spelling
	}
	c, partition, path, err := f.capability(r.Capability)
	if err != nil {
		return api.Grant{}, err
	}
	decision := verdict(outcome(path), path)
	switch decision.Outcome {
	case api.OutcomeDeny:
		f.record("grant.denied", &v.ID, nil, fmt.Sprintf(`{"capability":{"kind":"fs"},"reason":%q}`, decision.Summary))
		return api.Grant{}, &api.Error{Code: api.CodeDenied, Detail: "work denies " + r.Capability, Verdict: &decision}
	case api.OutcomeError:
		return api.Grant{}, &api.Error{Code: api.CodePolicyError, Detail: "the policy of work failed", Verdict: &decision}
	}
	narrowed := decision.Limits.ReadOnly && len(c.Rights) > 1
	if narrowed && !r.AcceptNarrower {
		return api.Grant{}, &api.Error{Code: api.CodeNarrower, Detail: "policy allows reading only", Verdict: &decision}
	}
	if narrowed {
		c.Rights = c.Rights[:1]
	}
	if v.State != api.VMRunning {
		return api.Grant{}, api.Errorf(api.CodeConflict, "%s does not run", v.Name)
	}
	mode := "ro"
	if len(c.Rights) > 1 {
		mode = "rw"
	}
	g := &api.Grant{
		ID: uuid.New(), Holder: v.ID, HolderName: v.Name, Partition: &partition, PartitionName: "work", Capability: c,
		Spelling: "fs:" + mode + ":" + partition.String() + ":" + path, Spoken: "fs:" + mode + ":work:" + path,
		Label: orElse(r.Label, "files"), State: api.GrantPending, Generation: 1, Created: time.Now(), Persist: r.Persist,
		Observed: api.Observed{State: "attaching"}, Decision: &decision, Narrowed: narrowed, MaxUses: r.MaxUses, MaxDepth: r.MaxDepth,
	}
	if r.TTLSeconds != nil {
		t := g.Created.Add(time.Duration(*r.TTLSeconds) * time.Second)
		g.Expires = &t
	}
	if r.Parent != "" {
		parent, err := f.grant(r.Parent)
		if err != nil {
			return api.Grant{}, err
		}
		g.Parent, g.Depth = &parent.ID, parent.Depth+1
	}
	switch {
	case strings.HasPrefix(path, "/full"):
		return api.Grant{}, api.Errorf(api.CodeNoSlots, "%s has no device slot left", v.Name)
	case strings.HasPrefix(path, "/busy"):
		g.State, g.Trouble = api.GrantPending, busy()
		f.grants = append(f.grants, g)
		return *g, nil
	case strings.HasPrefix(path, "/slow"):
		f.grants = append(f.grants, g)
		return api.Grant{}, &api.Error{Code: api.CodeTimeout, Detail: fmt.Sprintf("not mounted within %g s", r.TimeoutSeconds), Grant: g}
	}
	if r.Wait {
		g.State, g.Observed = api.GrantActive, api.Observed{State: "attached"}
		if g.NoAgent = v.ID == webVM; !g.NoAgent {
			g.MountPath = "/run/spectrum/fs/" + g.Label
		}
	}
	f.grants = append(f.grants, g)
	uid := by.UID
	f.record("grant.requested", &v.ID, &g.ID, fmt.Sprintf(`{"capability":{"kind":"fs","resource":%s,"rights":["read"]},"label":%q}`, c.Resource, g.Label))
	f.events[len(f.events)-1].Actor = api.Actor{Kind: "person", UID: &uid, PID: int(by.PID)}
	return *g, nil
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

func (f *fake) grant(ref string) (*api.Grant, error) {
	var fit []*api.Grant
	for _, g := range f.grants {
		if len(ref) >= 8 && strings.HasPrefix(g.ID.String(), ref) {
			fit = append(fit, g)
		}
	}
	if len(fit) != 1 {
		return nil, api.Errorf(api.CodeNotFound, "there is no grant %q", ref)
	}
	return fit[0], nil
}

func (f *fake) ListGrants(_ context.Context, q api.GrantFilter) (out []api.Grant, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var holder uuid.UUID
	if q.VM != "" {
		v, err := f.vm(q.VM)
		if err != nil {
			return nil, err
		}
		holder = v.ID
	}
	for _, g := range f.grants {
		ended := g.State == api.GrantRevoked || g.State == api.GrantFailed
		if ended && !q.All && len(q.State) == 0 || len(q.State) > 0 && !slices.Contains(q.State, g.State) ||
			holder != uuid.Nil && g.Holder != holder || q.Resource != "" && !strings.HasPrefix(g.Spoken, q.Resource) {
			continue
		}
		out = append(out, *g)
	}
	return out, nil
}

func (f *fake) ShowGrant(_ context.Context, ref string) (api.Grant, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	g, err := f.grant(ref)
	if err != nil {
		return api.Grant{}, err
	}
	return *g, nil
}

// end revokes a grant and all that derives from it, as far as the guest's
// process can be made to let go.
func (f *fake) end(g *api.Grant) (ended []*api.Grant) {
	if g.State == api.GrantRevoked {
		return nil
	}
	g.State, g.Generation, g.MountPath, g.Observed = api.GrantRevoked, g.Generation+1, "", api.Observed{State: "gone"}
	if g.Holder == privVM {
		g.State, g.Observed = api.GrantRevoking, api.Observed{State: "detaching"}
	}
	f.record("grant."+string(g.State), &g.Holder, &g.ID, `{"reason":"revoked by a person"}`)
	ended = []*api.Grant{g}
	for _, child := range f.grants {
		if child.Parent != nil && *child.Parent == g.ID {
			ended = append(ended, f.end(child)...)
		}
	}
	return ended
}

func (f *fake) Revoke(_ context.Context, _ api.Caller, r api.RevokeRequest) (res api.RevokeResult, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var roots []*api.Grant
	for _, id := range r.IDs {
		g, err := f.grant(id)
		if err != nil {
			return res, err
		}
		roots = append(roots, g)
	}
	var holder uuid.UUID
	if r.VM != "" {
		v, err := f.vm(r.VM)
		if err != nil {
			return res, err
		}
		holder = v.ID
	}
	for _, g := range f.grants {
		if r.All || r.VM != "" && g.Holder == holder || r.Resource != "" && strings.HasPrefix(g.Spoken, r.Resource) {
			roots = append(roots, g)
		}
	}
	if r.DryRun {
		return api.RevokeResult{WouldRevoke: f.fall(roots), DryRun: true}, nil
	}
	for _, g := range roots {
		for _, e := range f.end(g) {
			if !r.Wait || e.State == api.GrantRevoking {
				e := *e
				e.State = api.GrantRevoking
				res.Revoking = append(res.Revoking, e)
			} else {
				res.Revoked = append(res.Revoked, *e)
			}
		}
	}
	return res, nil
}

func (f *fake) Token(_ context.Context, _ api.Caller, ref string) (api.Token, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	g, err := f.grant(ref)
	if err != nil {
		return api.Token{}, err
	}
	if g.State != api.GrantActive {
		return api.Token{}, api.Errorf(api.CodeConflict, "grant %s is %s", g.ID, g.State)
	}
	return api.Token{Grant: g.ID, Token: "0oRDoQEnoFgg-secret"}, nil
}

func (f *fake) Explain(_ context.Context, _ api.Caller, r api.GrantRequest) (api.Explanation, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v, err := f.vm(r.VM)
	if err != nil {
		return api.Explanation{}, err
	}
	c, partition, path, err := f.capability(r.Capability)
	if err != nil {
		return api.Explanation{}, err
	}
	x := api.Explanation{Request: r, Verdict: verdict(outcome(path), path)}
	if x.Verdict.Outcome == api.OutcomeAllow {
		x.Effective, x.Spelling = &c, "fs:ro:"+partition.String()+":"+path
		x.Actions = []string{"attach " + path + " to " + v.Name, "mount it"}
	}
	return x, nil
}

func (f *fake) ReloadPolicy(ctx context.Context, _ api.Caller) (api.PolicyStatus, error) {
	st, err := f.PolicyStatus(ctx)
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil && f.broken {
		st.Engines[1].State, st.Engines[1].Error = "stale", "svc/policy/work.rego:3:1: rego_parse_error: unexpected token"
	}
	return st, err
}

func (f *fake) PolicyStatus(context.Context) (api.PolicyStatus, error) {
	now := time.Now()
	return api.PolicyStatus{Engines: []api.EngineStatus{
		{Engine: "host", State: "loaded", Revision: strings.Repeat("ab", 32), LoadedAt: &now, Files: []string{"host.rego"}, Decisions: 3},
		{Engine: work.String(), Name: "work", State: "loaded", Revision: strings.Repeat("cd", 32), LoadedAt: &now, Files: []string{"a.rego", "b.rego"}},
	}}, nil
}

func (f *fake) ListNames(context.Context) (out []api.Name, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for name, p := range f.names {
		out = append(out, api.Name{Name: name, Partition: p})
	}
	slices.SortFunc(out, func(a, b api.Name) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

func (f *fake) SetName(_ context.Context, _ api.Caller, name string, p uuid.UUID) (api.Name, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if other, taken := f.names[name]; taken && other != p {
		return api.Name{}, api.Errorf(api.CodeConflict, "%s is the name of partition %s", name, other)
	}
	for n, q := range f.names {
		if q == p {
			delete(f.names, n)
		}
	}
	f.names[name] = p
	f.record("name.set", nil, nil, fmt.Sprintf(`{"name":%q}`, name))
	return api.Name{Name: name, Partition: p}, nil
}

func (f *fake) RemoveName(_ context.Context, _ api.Caller, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, known := f.names[name]; !known {
		return api.Errorf(api.CodeNotFound, "there is no name %q", name)
	}
	delete(f.names, name)
	return nil
}

func (f *fake) ListPartitions(context.Context) ([]api.Partition, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := []api.Partition{
		{ID: work, Present: true, Writable: true, VMs: 2, Policy: "loaded"},
		{ID: private, Present: false, VMs: 1, Policy: "none", Problems: []string{"svc/data/x/vm.toml:3: unknown key"}},
	}
	for name, p := range f.names {
		for i := range out {
			if out[i].ID == p {
				out[i].Name = name
			}
		}
	}
	return out, nil
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
