// Command rotate writes to a ledger and rotates it, to be killed at a failpoint.
// It says on stdout what was acknowledged.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
)

func main() {
	if err := run(os.Args[1]); err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
}

func run(dir string) error {
	ctx := context.Background()
	kinds := capabilities.NewKinds(capabilities.FS{})
	l, err := ledger.Open(ctx, ledger.Options{Dir: dir, Kinds: kinds, Clock: clock.System{}})
	if err != nil {
		return err
	}
	c, err := kinds.Parse("fs:ro:99999999-9999-4999-8999-999999999999:/a", nil)
	if err != nil {
		return err
	}
	by := ledger.Actor{Kind: ledger.ActorBroker}
	update := func(e ledger.Event) error {
		_, err := l.Update(ctx, func(tx *ledger.Tx) error { return tx.Append(e) })
		return err
	}
	holder := uuid.New()
	for i := range 60 {
		id := uuid.New()
		if err := update(ledger.NewGrant(by, id, holder, uuid.Nil, ledger.GrantRecord{Capability: c})); err != nil {
			return err
		}
		fmt.Println("granted", id)
		if i%2 == 0 {
			if err := update(ledger.NewChange(ledger.GrantRevoking, by, id, ledger.Change{})); err != nil {
				return err
			}
			fmt.Println("revoked", id)
		}
		if i%20 == 19 {
			r, err := l.Rotate(ctx, by)
			if err != nil {
				return err
			}
			fmt.Println("rotated", r.Archive.Name)
		}
	}
	return l.Close()
}
