package broker

import (
	"context"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/policy"
	"spectrum-os.org/broker/sources"
)

// selfName stands for the VM's own partition in the spellings of its
// definition and of its guest.
const selfName = "self"

// selfResolver resolves "self" and UUIDs: nobody can learn petnames by it.
type selfResolver struct{ partition uuid.UUID }

func (r selfResolver) Partition(name string) (uuid.UUID, error) {
	if name == selfName && r.partition != uuid.Nil {
		return r.partition, nil
	}
	id, err := uuid.Parse(name)
	if err != nil || len(name) != 36 {
		return uuid.Nil, api.Errorf(api.CodeNotFound, "partition %q is neither %q nor a UUID", name, selfName)
	}
	return id, nil
}

// requestDeclared requests what a VM's definition declares, at every start of
// the VM: policy decides each time. It stops when that run ends.
func (b *Broker) requestDeclared(u *unit) {
	def, ok := b.inv().definitions[u.vm]
	if !ok || len(def.Grants) == 0 {
		return
	}
	run := u.instance()
	b.wg.Go(func() {
		for _, declared := range def.Grants {
			if b.ctx.Err() != nil || b.unit(u.vm) != u || u.instance() != run {
				return
			}
			if err := b.requestOne(b.ctx, def, run, declared); err != nil && b.ctx.Err() == nil {
				b.log.Warn("a declared grant is refused", "vm", u.vm, "capability", declared.Capability, "why", err)
			}
		}
	})
}

func (b *Broker) requestOne(ctx context.Context, def sources.Definition, run string, declared sources.DeclaredGrant) error {
	if !def.BuiltIn() {
		b.awaitFirstLoads(ctx, policy.PartitionEngine(def.Partition))
	}
	ctx, cancel := context.WithTimeout(ctx, b.o.stretched(30*time.Second))
	defer cancel()
	c, err := b.kinds.Parse(declared.Capability, selfResolver{def.Partition})
	if err != nil {
		return err
	}
	r := request{
		action: policy.ActionRequest, actor: ledger.Actor{Kind: ledger.ActorDefinition, VM: def.ID},
		holder: def.ID, run: run, capability: c, label: declared.Label, declared: true, narrower: true,
	}
	if declared.TTLSeconds > 0 {
		r.ttl = &declared.TTLSeconds
	}
	_, err = b.grant(ctx, r)
	return err
}
