package applyfs

import (
	"context"
	"errors"
	"fmt"

	"spectrum-os.org/broker/broker/reconcile"
	"spectrum-os.org/broker/vmm/shim"
)

var _ reconcile.Extender = (*Applier)(nil)

// Extend tells the VM's shim the share's new deadline. Nothing of the share is
// touched: what the guest has open stays open.
func (a *Applier) Extend(ctx context.Context, o reconcile.Object) error {
	s, ok := a.host.Shim(o.VM)
	if !ok {
		return fmt.Errorf("VM %s: %w", o.VM, reconcile.ErrNotNow)
	}
	_, err := s.Extend(ctx, shim.Extension{ID: o.ID, Generation: o.Generation, Instance: o.Instance, Deadline: o.Deadline})
	if err == nil {
		return nil
	}
	if refused, ok := errors.AsType[*shim.Error](err); ok && (refused.Code == shim.CodeRemoved || refused.Code == shim.CodeExpired) {
		return fmt.Errorf("%w: %w", reconcile.ErrTooLate, err)
	}
	if a.noRun(o.VM, err) {
		return fmt.Errorf("%w: %w", reconcile.ErrNotNow, err)
	}
	return err
}
