package cli

import (
	"fmt"
	"io"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"spectrum-os.org/broker/broker/api"
)

func (a *app) revokeCommand() *cobra.Command {
	var (
		req     api.RevokeRequest
		waiting waitFlags
	)
	cmd := &cobra.Command{
		Use:   "revoke {GRANT... | --vm VM | --resource CAPABILITY | --all}",
		Short: "Take grants back, with all that was derived from them",
		Long: `Take grants back, with all that was derived from them. It returns when access
is cut, even for files that the guest has open. When that is not yet so after
the timeout, or with --no-wait, it says "revoking" and exits with code 6: the
revocation is on record and goes on.`,
		Example: `  spectrum-cap revoke 5f3a9c01
  spectrum-cap revoke --vm work/mail --reason "laptop is being lent"
  spectrum-cap revoke --resource fs:ro:work:/invoices
  spectrum-cap revoke --vm work/mail --dry-run
  spectrum-cap revoke --all`,
		ValidArgsFunction: a.completeGrants,
		RunE: func(cmd *cobra.Command, ids []string) error {
			given := 0
			for _, is := range []bool{len(ids) > 0, req.VM != "", req.Resource != "", req.All} {
				if is {
					given++
				}
			}
			if given != 1 {
				return usage("revoke takes either grants, or one of --vm, --resource and --all")
			}
			wait, timeout, err := waiting.read(cmd)
			if err != nil {
				return err
			}
			req.IDs, req.Wait, req.TimeoutSeconds = ids, wait, timeout.Seconds()
			ctx, cancel := within(cmd.Context(), timeout)
			defer cancel()
			end := a.progress("waiting until access is cut")
			res, err := a.broker().Revoke(ctx, req)
			end()
			if err != nil {
				return err
			}
			if req.DryRun {
				return a.wouldRevoke(res)
			}
			return a.revoked(res)
		},
	}
	f := cmd.Flags()
	f.StringVar(&req.VM, "vm", "", "all that this `VM` holds")
	f.StringVar(&req.Resource, "resource", "", "all that reaches into this `capability`'s resource")
	f.BoolVar(&req.All, "all", false, "everything")
	f.BoolVar(&req.DryRun, "dry-run", false, "print what would be revoked, and change nothing")
	f.StringVar(&req.Reason, "reason", "", "`text` for the audit")
	waiting.register(f, "when access is cut")
	_ = cmd.RegisterFlagCompletionFunc("vm", a.completeVM)
	_ = cmd.RegisterFlagCompletionFunc("resource", a.completeCapability)
	_ = cmd.RegisterFlagCompletionFunc("reason", cobra.NoFileCompletions)
	return cmd
}

func (a *app) revoked(res api.RevokeResult) error {
	all := append(append([]api.Grant{}, res.Revoked...), res.Revoking...)
	err := a.print(res, func(w io.Writer) {
		if len(all) == 0 {
			_, _ = fmt.Fprintln(w, "there was nothing to revoke")
			return
		}
		short := a.short(grantIDs(all))
		for _, g := range all {
			state := "revoked"
			if g.State != api.GrantRevoked {
				state = string(g.State)
			}
			line := fmt.Sprintf("%s %s  %s  %s", state, short(g.ID), orElse(g.HolderName, g.Holder.String()), orElse(g.Spoken, g.Spelling))
			if g.Degraded != "" {
				line += "  degraded: " + g.Degraded
			}
			_, _ = fmt.Fprintln(w, plain(line))
		}
	})
	if err != nil {
		return err
	}
	if n := len(res.Revoking); n > 0 {
		return &codedError{exitRevoking, fmt.Sprintf("revoking: access is not yet cut for %d of %d grants", n, len(all))}
	}
	return nil
}

func grantIDs(grants []api.Grant) []uuid.UUID {
	ids := make([]uuid.UUID, len(grants))
	for i, g := range grants {
		ids[i] = g.ID
	}
	return ids
}

func vmIDs(vms []api.VM) []uuid.UUID {
	ids := make([]uuid.UUID, len(vms))
	for i, v := range vms {
		ids[i] = v.ID
	}
	return ids
}
