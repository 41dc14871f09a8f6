package shim

import (
	"context"

	"spectrum-os.org/broker/capabilities"
)

// Extension moves the deadline of an object that exists.
type Extension struct {
	ID string
	// Generation is newer than that of whatever set the deadline before.
	Generation uint64
	// Instance is the run of the VM that the object is for.
	Instance string
	Deadline capabilities.Deadline // zero: never
}

// Extend moves the deadline of an object, whose device stays as it is. It is
// idempotent by id and generation. It fails with CodeRemoved where the object
// has ended, or is about to: what ended is not brought back.
func (c *Client) Extend(ctx context.Context, e Extension) (ObjectState, error) {
	return c.objectCall(ctx, &request{Op: opExtend, ID: e.ID, Generation: e.Generation, Instance: e.Instance, Deadline: e.Deadline})
}

func (r *request) checkExtension() error {
	if err := checkID(r.ID); err != nil {
		return err
	}
	if r.Generation == 0 {
		return refuse(CodeBadRequest, "the extension of %s has no generation", r.ID)
	}
	return nil
}

// extend moves an object's deadline.
func (s *server) extend(r *request) (ObjectState, *Error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.objects[r.ID]
	switch {
	case s.phase != Running:
		return ObjectState{}, refuse(CodeNotRunning, "the VM is %s", s.phase)
	case r.Instance != s.instance.id:
		return ObjectState{}, refuse(CodeWrongInstance, "%s is for instance %q of the VM, which is now %q", r.ID, r.Instance, s.instance.id)
	case o == nil || o.ending() || o.phase == Detaching || o.phase == Gone:
		return ObjectState{}, refuse(CodeRemoved, "%s has ended", r.ID)
	case s.buried.has(r.ID, r.Generation) || r.Generation < o.spec.Generation:
		return ObjectState{}, refuse(CodeStaleGeneration, "generation %d of %s is older than %d", r.Generation, r.ID, o.spec.Generation)
	case r.Generation == o.spec.Generation && !r.Deadline.Equal(o.spec.Deadline):
		return ObjectState{}, refuse(CodeStaleGeneration, "generation %d of %s has another deadline", r.Generation, r.ID)
	case r.Deadline.Passed(s.clock.Now()):
		return ObjectState{}, refuse(CodeExpired, "the deadline of %s has passed", r.ID)
	}
	if r.Generation != o.spec.Generation {
		o.spec.Generation, o.spec.Deadline = r.Generation, r.Deadline
		s.log.Info("deadline is moved", "object", o.id, "generation", r.Generation, "until", r.Deadline.Wall)
		s.bump()
		s.deadlineChanged()
	}
	return o.state(), nil
}
