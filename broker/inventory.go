package broker

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/failpoint"
	"spectrum-os.org/broker/policy"
	"spectrum-os.org/broker/sources"
)

// builtinName stands for the built-in directory where a partition's name does.
const builtinName = "builtin"

// minPrefix is the shortest UUID prefix that refers to anything.
const minPrefix = 8

// inventory is what was found at the last scan. It is never changed once it
// is published.
type inventory struct {
	partitions  map[uuid.UUID]sources.Partition
	definitions map[uuid.UUID]sources.Definition
	problems    []sources.Problem
}

// scan reads the sources and binds every VM to the partition that presented
// it first.
func (b *Broker) scan(ctx context.Context) (*inventory, error) {
	found, err := sources.Scan(ctx, sources.Options{
		Builtin: b.o.Builtin, Partitions: b.o.Partitions, Log: b.log,
		KnownIDs: func(partition uuid.UUID, alias string) (id uuid.UUID, ok bool) {
			b.ledger.View(func(s *ledger.State) { id, ok = s.KnownVM(partition, alias) })
			return id, ok
		},
		BoundTo: func(vm uuid.UUID) (partition uuid.UUID, ok bool) {
			b.ledger.View(func(s *ledger.State) { partition, ok = s.Binding(vm) })
			return partition, ok
		},
	})
	if err != nil {
		return nil, fmt.Errorf("cannot read the VM definitions: %w", err)
	}
	inv := &inventory{
		partitions:  map[uuid.UUID]sources.Partition{},
		definitions: map[uuid.UUID]sources.Definition{},
		problems:    found.Problems,
	}
	for _, p := range found.Partitions {
		inv.partitions[p.ID] = p
	}
	for _, d := range found.Definitions {
		inv.definitions[d.ID] = d
	}
	failpoint.Hit("bind.before")
	_, err = b.ledger.Update(ctx, func(tx *ledger.Tx) error {
		for _, d := range found.Definitions {
			if _, bound := tx.State().Binding(d.ID); bound {
				continue
			}
			e := ledger.Event{
				Type: ledger.VMBound, Actor: brokerActor, VM: d.ID, Partition: d.Partition,
				Data: ledger.JSON(ledger.BoundData{Alias: d.Alias}),
			}
			if err := tx.Append(e); err != nil {
				return fmt.Errorf("cannot bind VM %s to its partition: %w", d.ID, err)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, p := range inv.problems {
		b.log.Warn("a definition is not used", "problem", p.String())
	}
	return inv, nil
}

func (b *Broker) inv() *inventory { return b.inventory.Load() }

// Partition implements applyfs.Host.
func (b *Broker) Partition(id uuid.UUID) (sources.Partition, bool) {
	p, ok := b.inv().partitions[id]
	return p, ok
}

// petname is what people call the partition: its name in the ledger, or the
// first digits of its UUID.
func (b *Broker) petname(partition uuid.UUID) string {
	if partition == uuid.Nil {
		return builtinName
	}
	var name string
	b.ledger.View(func(s *ledger.State) { name = s.Names()[partition] })
	if name == "" {
		name = partition.String()[:minPrefix]
	}
	return name
}

// engineName is what people call a policy engine.
func (b *Broker) engineName(id policy.EngineID) string {
	if id.Host {
		return "the host"
	}
	return b.petname(id.Partition)
}

// vmName is partition/alias.
func (b *Broker) vmName(vm uuid.UUID) string {
	if d, ok := b.inv().definitions[vm]; ok {
		return b.petname(d.Partition) + "/" + d.Alias
	}
	return vm.String()
}

// resolver resolves partition names for a person.
type resolver struct{ b *Broker }

// Partition resolves a petname, or a UUID's first digits.
func (r resolver) Partition(name string) (uuid.UUID, error) {
	return r.b.resolvePartition(name)
}

func (b *Broker) resolvePartition(name string) (uuid.UUID, error) {
	names := map[uuid.UUID]string{}
	b.ledger.View(func(s *ledger.State) { names = s.Names() })
	for id, n := range names {
		if n == name {
			return id, nil
		}
	}
	if id, err := uuid.Parse(name); err == nil && len(name) == 36 {
		return id, nil
	}
	var fits []string
	var fit uuid.UUID
	if len(name) >= minPrefix {
		for id := range b.inv().partitions {
			if strings.HasPrefix(id.String(), strings.ToLower(name)) {
				fit = id
				fits = append(fits, id.String())
			}
		}
	}
	slices.Sort(fits)
	switch len(fits) {
	case 0:
		return uuid.Nil, api.Errorf(api.CodeNotFound, "there is no partition %q; `spectrum-cap partition list` shows them", name)
	case 1:
		return fit, nil
	}
	e := api.Errorf(api.CodeAmbiguous, "partition %q fits %d partitions", name, len(fits))
	e.Candidates = fits
	return uuid.Nil, e
}

// resolveVM resolves a reference: partition/alias, an alias that only one VM
// has, a UUID or at least eight of its first digits.
func (b *Broker) resolveVM(ref string) (uuid.UUID, error) {
	if ref == "" {
		return uuid.Nil, api.Errorf(api.CodeInvalid, "no VM is named")
	}
	inv := b.inv()
	known := map[uuid.UUID]bool{}
	for id := range inv.definitions {
		known[id] = true
	}
	for id := range b.units() {
		known[id] = true
	}
	fits := map[uuid.UUID]bool{}
	if prefix, alias, ok := strings.Cut(ref, "/"); ok {
		partition := uuid.Nil
		if prefix != builtinName {
			var err error
			if partition, err = b.resolvePartition(prefix); err != nil {
				return uuid.Nil, err
			}
		}
		for id, d := range inv.definitions {
			if d.Partition == partition && slices.Contains(d.Aliases, alias) {
				fits[id] = true
			}
		}
	} else if id, err := uuid.Parse(ref); err == nil && len(ref) == 36 && known[id] {
		// A whole UUID is that VM, whatever a partition calls one of its own.
		return id, nil
	} else {
		for id, d := range inv.definitions {
			if slices.Contains(d.Aliases, ref) {
				fits[id] = true
			}
		}
		// An alias that looks like the first digits of another VM's UUID does
		// not win over it: both fit, and neither is taken.
		if len(ref) >= minPrefix {
			for id := range known {
				if strings.HasPrefix(id.String(), strings.ToLower(ref)) {
					fits[id] = true
				}
			}
		}
	}
	switch len(fits) {
	case 0:
		return uuid.Nil, api.Errorf(api.CodeNotFound, "there is no VM %q; `spectrum-cap vm list` shows them", ref)
	case 1:
		for id := range fits {
			return id, nil
		}
	}
	e := api.Errorf(api.CodeAmbiguous, "VM %q fits %d VMs; name one of them", ref, len(fits))
	for id := range fits {
		e.Candidates = append(e.Candidates, b.vmName(id))
	}
	slices.Sort(e.Candidates)
	return uuid.Nil, e
}

// resolveGrant resolves a grant's id, or at least eight of its first digits.
func (b *Broker) resolveGrant(ref string) (ledger.Grant, error) {
	var fits []ledger.Grant
	add := func(s *ledger.State, ids ...uuid.UUID) {
		for _, id := range ids {
			if g, ok := s.Grant(id); ok {
				fits = append(fits, g)
			}
		}
	}
	if id, err := uuid.Parse(ref); err == nil {
		b.ledger.View(func(s *ledger.State) { add(s, id) })
	} else if len(ref) >= minPrefix {
		for at, more := 0, true; more; more = at > 0 {
			b.ledger.View(func(s *ledger.State) {
				var ids []uuid.UUID
				ids, at = s.Prefixed(strings.ToLower(ref), at)
				add(s, ids...)
			})
		}
	}
	switch len(fits) {
	case 0:
		return ledger.Grant{}, b.noGrant(ref)
	case 1:
		return fits[0], nil
	}
	e := api.Errorf(api.CodeAmbiguous, "%q fits %d grants", ref, len(fits))
	for _, g := range fits {
		e.Candidates = append(e.Candidates, g.ID.String())
	}
	return ledger.Grant{}, e
}

// loadPolicies loads the host's policy and each partition's. A policy that
// does not load leaves the last good one in force, or, where there is none,
// denies everything; both are on record.
func (b *Broker) loadPolicies(ctx context.Context, actor ledger.Actor) error {
	b.loading.Lock()
	defer b.loading.Unlock()
	inv := b.inv()
	var mu sync.Mutex
	var errs []error
	// Side by side, so that one that takes its ten seconds delays no other.
	var loads errgroup.Group
	loads.SetLimit(16)
	load := func(id policy.EngineID, partition uuid.UUID, read func() (map[string][]byte, []byte, string, error), dir string) {
		// Last: no decision is on record before the policy that it rests on.
		defer b.firstLoaded(id)
		files, data, dataName, err := read()
		revision := ""
		if err == nil {
			revision, err = b.engines.Load(ctx, id, policy.Sources{Files: files, Data: data, DataName: dataName, Dir: dir})
		}
		e := ledger.Event{Type: ledger.PolicyLoaded, Actor: actor, Partition: partition, Data: ledger.JSON(policyData{Engine: id.String(), Revision: revision})}
		if err != nil {
			b.log.Error("a policy is not loaded", "engine", id, "err", err)
			e.Type = ledger.PolicyRejected
			e.Data = ledger.JSON(policyData{Engine: id.String(), Error: err.Error()})
		}
		names := slices.Sorted(maps.Keys(files))
		if dataName != "" {
			names = append(names, dataName)
		}
		b.setPolicy(id, names, err)
		if _, err := b.ledger.Update(ctx, func(tx *ledger.Tx) error { return tx.Append(e) }); err != nil {
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, fmt.Errorf("cannot record which policy is in force: %w", err))
		}
	}
	loads.Go(func() error {
		load(policy.HostEngine, uuid.Nil, func() (map[string][]byte, []byte, string, error) {
			return sources.ReadPolicyDir(b.o.HostPolicy)
		}, string(b.o.HostPolicy))
		return nil
	})
	for id, p := range inv.partitions {
		loads.Go(func() error {
			load(policy.PartitionEngine(id), id, p.ReadPolicy, string(p.PolicyDir()))
			return nil
		})
	}
	_ = loads.Wait() // each records how it went
	for _, s := range b.engines.Status() {
		if _, ok := inv.partitions[s.Engine.Partition]; !ok && !s.Engine.Host {
			b.engines.Remove(s.Engine)
		}
	}
	return errors.Join(errs...)
}

// firstPolicies loads all policies, and waits for them for a while: one partition
// must not keep the others, and the person, from the broker. What is asked of an
// engine waits until it has been loaded.
func (b *Broker) firstPolicies(ctx context.Context) error {
	const patience = 3 * time.Second
	first := map[policy.EngineID]chan struct{}{policy.HostEngine: make(chan struct{})}
	for id := range b.inv().partitions {
		first[policy.PartitionEngine(id)] = make(chan struct{})
	}
	b.mu.Lock()
	b.firstLoads = first
	b.mu.Unlock()
	loaded := make(chan error, 1)
	b.wg.Go(func() { loaded <- b.loadPolicies(ctx, brokerActor) })
	select {
	case err := <-loaded:
		return err
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(b.o.stretched(patience)):
	}
	b.log.Warn("serving while policies are still being loaded; what is asked of them waits")
	b.wg.Go(func() {
		if err := <-loaded; err != nil && ctx.Err() == nil {
			b.log.Error("the policies were not all read", "err", err)
		}
	})
	return nil
}

func (b *Broker) firstLoaded(id policy.EngineID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if c, ok := b.firstLoads[id]; ok {
		close(c)
		delete(b.firstLoads, id)
	}
}

// awaitFirstLoads returns when none of the engines is being loaded for the first
// time, or ctx ends, or after a bound, since a partition's file system may never
// answer. An engine that has nothing loaded by then denies.
func (b *Broker) awaitFirstLoads(ctx context.Context, ids ...policy.EngineID) {
	ctx, cancel := context.WithTimeout(ctx, b.o.stretched(30*time.Second))
	defer cancel()
	for _, id := range append([]policy.EngineID{policy.HostEngine}, ids...) {
		b.mu.Lock()
		c, ok := b.firstLoads[id]
		b.mu.Unlock()
		if !ok {
			continue
		}
		select {
		case <-c:
		case <-ctx.Done():
			return
		case <-b.ctx.Done():
			return
		}
	}
}

type policyData struct {
	Engine   string `json:"engine"`
	Revision string `json:"revision,omitempty"`
	Error    string `json:"error,omitempty"`
}

// setPolicy keeps how the load of a policy went.
func (b *Broker) setPolicy(id policy.EngineID, files []string, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err == nil {
		delete(b.policyErrors, id)
		b.policyFiles[id] = files
		return
	}
	b.policyErrors[id] = err.Error()
}

// spoken is the capability as people spell it.
func (b *Broker) spoken(c capabilities.Capability) string { return c.Spoken(b.petname) }
