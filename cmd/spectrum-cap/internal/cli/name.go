package cli

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"spectrum-os.org/broker/broker/api"
)

func (a *app) nameCommand() *cobra.Command {
	cmd := group(&cobra.Command{
		Use:   "name",
		Short: "Give partitions names of your own",
		Long: `Give partitions names of your own. A name is kept by the broker and never read
off the disk; renaming a partition changes no grant.`,
		Example: `  spectrum-cap name set work 6d1f7c8e-5a0b-4c3e-9d52-0f6b8a7e1c24
  spectrum-cap name list`,
	})
	cmd.AddCommand(
		&cobra.Command{
			Use:     "list",
			Aliases: []string{"ls"},
			Short:   "List the names",
			Example: `  spectrum-cap name list`,
			Args:    args(0, 0, ""),
			RunE: func(cmd *cobra.Command, _ []string) error {
				names, err := a.broker().ListNames(cmd.Context())
				if err != nil {
					return err
				}
				return a.print(api.NameList{Names: names}, func(w io.Writer) {
					t := table{head: []string{"NAME", "PARTITION"}}
					for _, n := range names {
						t.add(n.Name, n.Partition.String())
					}
					t.write(w)
				})
			},
		},
		&cobra.Command{
			Use:   "set NAME PARTITION",
			Short: "Name a partition",
			Example: `  spectrum-cap name set work 6d1f7c8e-5a0b-4c3e-9d52-0f6b8a7e1c24
  spectrum-cap name set job work   # renames it`,
			Args: args(2, 2, "a name and a partition"),
			ValidArgsFunction: func(cmd *cobra.Command, got []string, word string) ([]string, cobra.ShellCompDirective) {
				if len(got) != 1 {
					return nil, cobra.ShellCompDirectiveNoFileComp
				}
				return a.completePartition(cmd, got, word)
			},
			RunE: func(cmd *cobra.Command, got []string) error {
				id, err := a.partition(cmd.Context(), got[1])
				if err != nil {
					return err
				}
				n, err := a.broker().SetName(cmd.Context(), got[0], id)
				if err != nil {
					return err
				}
				return a.print(n, func(w io.Writer) {
					_, _ = fmt.Fprintf(w, "partition %s is now called %s\n", n.Partition, plain(n.Name))
				})
			},
		},
		&cobra.Command{
			Use:     "remove NAME",
			Aliases: []string{"rm"},
			Short:   "Forget a name",
			Example: `  spectrum-cap name remove work`,
			Args:    args(1, 1, "a name"),
			ValidArgsFunction: func(cmd *cobra.Command, got []string, _ string) ([]string, cobra.ShellCompDirective) {
				return a.complete(cmd, len(got) == 0, func(ctx context.Context) ([]string, error) {
					names, err := a.broker().ListNames(ctx)
					var words []string
					for _, n := range names {
						words = append(words, n.Name)
					}
					return words, err
				})
			},
			RunE: func(cmd *cobra.Command, got []string) error {
				if err := a.broker().RemoveName(cmd.Context(), got[0]); err != nil {
					return err
				}
				return a.print(map[string]string{"removed": got[0]}, func(w io.Writer) {
					_, _ = fmt.Fprintf(w, "%s is no partition's name any more\n", plain(got[0]))
				})
			},
		},
	)
	return cmd
}

// partition finds the UUID that a partition's UUID, its first 8 or more
// digits, or its name stand for.
func (a *app) partition(ctx context.Context, ref string) (uuid.UUID, error) {
	if id, err := uuid.Parse(ref); err == nil && len(ref) == 36 {
		return id, nil
	}
	partitions, err := a.broker().ListPartitions(ctx)
	if err != nil {
		return uuid.Nil, err
	}
	var fit []api.Partition
	for _, p := range partitions {
		if p.Name == ref {
			return p.ID, nil
		}
		if len(ref) >= 8 && strings.HasPrefix(p.ID.String(), strings.ToLower(ref)) {
			fit = append(fit, p)
		}
	}
	switch len(fit) {
	case 0:
		return uuid.Nil, &api.Error{Code: api.CodeNotFound, Detail: fmt.Sprintf("there is no partition %q", ref)}
	case 1:
		return fit[0].ID, nil
	}
	e := &api.Error{Code: api.CodeAmbiguous, Detail: fmt.Sprintf("%q fits several partitions", ref)}
	for _, p := range fit {
		e.Candidates = append(e.Candidates, words(p.ID.String(), p.Name))
	}
	return uuid.Nil, e
}

func (a *app) partitionCommand() *cobra.Command {
	cmd := group(&cobra.Command{
		Use:     "partition",
		Short:   "Look at user partitions",
		Example: `  spectrum-cap partition list`,
	})
	cmd.AddCommand(&cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the partitions the broker knows, and what is wrong with them",
		Example: `  spectrum-cap partition list
  spectrum-cap partition list -o yaml`,
		Args: args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			partitions, err := a.broker().ListPartitions(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(api.PartitionList{Partitions: partitions}, func(w io.Writer) {
				t := table{head: []string{"PARTITION", "NAME", "PRESENT", "WRITABLE", "VMS", "GRANTS", "POLICY"}, paint: a.stateColumn(6)}
				for _, p := range partitions {
					t.add(p.ID.String(), p.Name, yesNo(p.Present), yesNo(p.Writable), strconv.Itoa(p.VMs), strconv.Itoa(p.Grants), p.Policy)
				}
				t.write(w)
				for _, p := range partitions {
					for _, problem := range p.Problems {
						_, _ = fmt.Fprintln(w, plain(orElse(p.Name, p.ID.String())+": "+problem))
					}
				}
			})
		},
	})
	return cmd
}
