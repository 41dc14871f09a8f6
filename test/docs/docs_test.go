package docs

import (
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode"

	"github.com/google/uuid"

	"spectrum-os.org/broker/policy"
	"spectrum-os.org/broker/sources"
)

const (
	root      = "../.."
	workerArg = "policy-worker"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == workerArg {
		os.Exit(policy.WorkerMain())
	}
	os.Exit(m.Run())
}

// page is one Markdown file.
type page struct {
	file   string // relative to root
	prose  []line // outside of fences
	fences []fence
}

type line struct {
	number int
	text   string
}

type fence struct {
	number   int // of its first line
	language string
	text     string
}

func pages(t *testing.T) []page {
	t.Helper()
	var all []page
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && name != root && (strings.HasPrefix(d.Name(), ".") || d.Name() == "bin" || d.Name() == "testdata"):
			return fs.SkipDir
		case d.IsDir() || filepath.Ext(name) != ".md":
			return nil
		}
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		all = append(all, parse(rel, string(b)))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 10 {
		t.Fatalf("only %d pages: the walk is wrong", len(all))
	}
	return all
}

func parse(file, text string) page {
	p := page{file: file}
	var open *fence
	for i, s := range strings.Split(text, "\n") {
		language, ok := strings.CutPrefix(s, "```")
		switch {
		case ok && open == nil:
			open = &fence{number: i + 2, language: language}
		case ok:
			p.fences = append(p.fences, *open)
			open = nil
		case open != nil:
			open.text += s + "\n"
		default:
			p.prose = append(p.prose, line{i + 1, s})
		}
	}
	return p
}

// anchors are the page's headings as a forge spells them in links.
func (p page) anchors() map[string]bool {
	all := map[string]bool{}
	for _, l := range p.prose {
		marks, title, ok := strings.Cut(l.text, " ")
		if !ok || marks == "" || strings.Trim(marks, "#") != "" {
			continue
		}
		slug := strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case r == '-' || r == '_' || unicode.IsLetter(r) || unicode.IsDigit(r):
				return unicode.ToLower(r)
			}
			return -1
		}, title)
		for unique, n := slug, 1; ; n++ {
			if !all[unique] {
				all[unique] = true
				break
			}
			unique = fmt.Sprintf("%s-%d", slug, n)
		}
	}
	return all
}

var (
	linkPattern = regexp.MustCompile(`\]\(([^)\s]+)[^)]*\)`)
	codePattern = regexp.MustCompile("`[^`]*`")
)

func TestLinks(t *testing.T) {
	all := pages(t)
	byFile := map[string]page{}
	for _, p := range all {
		byFile[p.file] = p
	}
	links := 0
	for _, p := range all {
		for _, l := range p.prose {
			for _, m := range linkPattern.FindAllStringSubmatch(codePattern.ReplaceAllString(l.text, ""), -1) {
				links++
				if problem := follow(byFile, p, m[1]); problem != "" {
					t.Errorf("%s:%d: link %s: %s", p.file, l.number, m[1], problem)
				}
			}
		}
	}
	if links < 20 {
		t.Errorf("only %d links: the pattern is wrong", links)
	}
}

// follow says what is wrong with a link; those that leave the tree are not
// followed.
func follow(byFile map[string]page, from page, link string) string {
	u, err := url.Parse(link)
	if err != nil {
		return err.Error()
	}
	if u.Scheme != "" {
		return ""
	}
	target := from.file
	if u.Path != "" {
		target = filepath.Join(filepath.Dir(from.file), u.Path)
		if !filepath.IsLocal(target) {
			return "leaves the tree"
		}
		if _, err := os.Stat(filepath.Join(root, target)); err != nil {
			return "leads nowhere"
		}
	}
	if u.Fragment == "" {
		return ""
	}
	if p, ok := byFile[target]; !ok || !p.anchors()[u.Fragment] {
		return "there is no such heading"
	}
	return ""
}

func TestFollow(t *testing.T) {
	here := parse("docs/a.md", "# One: *two*\n\n```sh\n# not a heading\n```\n## x `y z`\n## x y z\n")
	byFile := map[string]page{here.file: here}
	for _, c := range []struct{ link, want string }{
		{"#one-two", ""},
		{"#x-y-z-1", ""},
		{"#not-a-heading", "there is no such heading"},
		{"../README.md", ""},
		{"../../README.md", "leaves the tree"},
		{"missing.md", "leads nowhere"},
		{"https://example.org/x", ""},
	} {
		if got := follow(byFile, here, c.link); got != c.want {
			t.Errorf("%s: %q, want %q", c.link, got, c.want)
		}
	}
}

// TestPolicies compiles every policy that is shown; one without a package is
// a part of a partition's.
func TestPolicies(t *testing.T) {
	options := policy.Options{Worker: []string{"/proc/self/exe", workerArg}, Stretch: 4}
	found := 0
	for _, p := range pages(t) {
		for _, f := range p.fences {
			if f.language != "rego" {
				continue
			}
			found++
			text := f.text
			if !strings.Contains(text, "package ") {
				text = "package spectrum.grant\n\n" + text
			}
			dir := t.TempDir()
			write(t, filepath.Join(dir, "grant.rego"), text)
			findings, err := policy.Check(t.Context(), options, dir)
			if err != nil {
				t.Fatalf("%s:%d: %v", p.file, f.number, err)
			}
			for _, finding := range findings {
				t.Errorf("%s:%d: in the policy shown: %s", p.file, f.number, finding)
			}
		}
	}
	if found < 2 {
		t.Errorf("only %d policies in the pages", found)
	}
}

// TestFirstPolicy holds the policy of the first page to what it says, wherever
// the host is.
func TestFirstPolicy(t *testing.T) {
	for _, p := range pages(t) {
		if p.file != "README.md" {
			continue
		}
		for _, f := range p.fences {
			if f.language != "rego" {
				continue
			}
			dir := t.TempDir()
			write(t, filepath.Join(dir, "grant.rego"), f.text)
			write(t, filepath.Join(dir, "grant_test.rego"), `package spectrum.grant_test

import data.spectrum.grant

_asked(now, path) := {
	"now": now,
	"capability": {"kind": "fs", "resource": {"path": path}, "rights": ["read"]},
	"holder": {"own": {"labels": {"job": "reader"}}},
}

test_by_day if {
	grant.allow with input as _asked("2026-03-02T12:00:00+01:00", "/reports/2026")
	count(grant.deny) == 0 with input as _asked("2026-03-02T12:00:00+01:00", "/reports/2026")
}

test_elsewhere if not grant.allow with input as _asked("2026-03-02T12:00:00Z", "/letters")

# Night is where the host is: these are 10:30, 10:00 and 20:30 in UTC.
test_night_in_the_east if grant.deny["not at night"] with input as _asked("2026-03-02T23:30:00+13:00", "/reports/x")

test_night_in_the_west if grant.deny["not at night"] with input as _asked("2026-03-02T02:00:00-08:00", "/reports/x")

test_morning_in_the_east if count(grant.deny) == 0 with input as _asked("2026-03-02T06:00:00+09:30", "/reports/x")
`)
			options := policy.Options{Worker: []string{"/proc/self/exe", workerArg}, Stretch: 4}
			report, err := policy.Test(t.Context(), options, dir, "")
			if err != nil {
				t.Fatal(err)
			}
			if len(report.Results) != 5 || len(report.Findings) > 0 {
				t.Errorf("%s:%d: %d tests, findings %v", p.file, f.number, len(report.Results), report.Findings)
			}
			for _, r := range report.Results {
				if r.Failed() {
					t.Errorf("%s:%d: %s: %s %s", p.file, f.number, r.Name, r.Outcome, r.Detail)
				}
			}
			return
		}
	}
	t.Error("the first page shows no policy")
}

func TestDefinitions(t *testing.T) {
	found := 0
	for _, p := range pages(t) {
		for _, f := range p.fences {
			if f.language != "toml" {
				continue
			}
			found++
			partitions := t.TempDir()
			partition := filepath.Join(partitions, uuid.NewString())
			dir := filepath.Join(partition, "svc/data/shown")
			write(t, filepath.Join(partition, "files/x"), "")
			write(t, filepath.Join(dir, "vmlinux"), "kernel")
			write(t, filepath.Join(dir, "vm.toml"), f.text)
			inv, err := sources.Scan(t.Context(), sources.Options{Partitions: sources.HostPath(partitions)})
			if err != nil {
				t.Fatal(err)
			}
			if len(inv.Problems) > 0 || len(inv.Definitions) != 1 {
				t.Errorf("%s:%d: %d definitions, problems: %v", p.file, f.number, len(inv.Definitions), inv.Problems)
			}
		}
	}
	if found < 1 {
		t.Error("no vm.toml in the pages")
	}
}

func write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

var (
	shownPattern = regexp.MustCompile("^(?: {4}(?:\\$ )?|.*`)(spectrum-(?:cap|agent|broker) [^`#]*)")
	flagPattern  = regexp.MustCompile(`(?:^| )(--[a-z][a-z-]*)`)
	wordPattern  = regexp.MustCompile(`^[a-z]+$`)
)

// TestCommandLines finds the command and the flags of each command line that
// is shown on the generated page of its program.
func TestCommandLines(t *testing.T) {
	reference := map[string]string{}
	for _, program := range []string{"spectrum-cap", "spectrum-agent", "spectrum-broker"} {
		b, err := os.ReadFile(filepath.Join(root, "docs/reference", program+".md"))
		if err != nil {
			t.Fatal(err)
		}
		reference[program] = string(b)
	}
	found := 0
	for _, p := range pages(t) {
		if strings.HasPrefix(p.file, "docs/reference/") {
			continue
		}
		for _, l := range p.prose {
			m := shownPattern.FindStringSubmatch(l.text)
			if m == nil {
				continue
			}
			found++
			program, rest, _ := strings.Cut(m[1], " ")
			page := reference[program]
			if word, _, _ := strings.Cut(strings.TrimSpace(rest), " "); wordPattern.MatchString(word) &&
				!strings.Contains(page, "## "+program+" "+word+"\n") {
				t.Errorf("%s:%d: there is no command %s %s", p.file, l.number, program, word)
			}
			for _, flag := range flagPattern.FindAllStringSubmatch(rest, -1) {
				if !strings.Contains(page, flag[1]) {
					t.Errorf("%s:%d: %s has no flag %s", p.file, l.number, program, flag[1])
				}
			}
		}
	}
	if found < 20 {
		t.Errorf("only %d command lines: the pattern is wrong", found)
	}
}
