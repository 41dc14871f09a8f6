package policy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"sigs.k8s.io/yaml"

	"spectrum-os.org/broker/policies"
)

// program is one compiled revision: what a worker evaluates. Only a worker
// makes one; the compiler alone can take all memory and time there is.
type program struct {
	compiler *ast.Compiler
	store    storage.Store
	txn      storage.Transaction // one read transaction, for as long as the program lives
	query    ast.Body
	queryC   ast.QueryCompiler
	grant    []*ast.Rule // the rules of package spectrum.grant, for explanations
}

var (
	grantPackage   = ast.MustParseRef("data.spectrum.grant")
	libPackage     = ast.MustParseRef("data.partition.lib")
	shippedPackage = ast.MustParseRef("data.spectrum.lib")
	testPackage    = ast.MustParseRef("data.spectrum.grant_test")
	partitionData  = ast.MustParseRef("data.partition")
)

// answers are the rules of package spectrum.grant that the broker asks.
var answers = []string{"allow", "deny", "ask", "limits"}

// compilation collects what is wrong on the way to a program.
type compilation struct {
	src      Sources
	tests    bool // also compile *_test.rego
	modules  map[string]*ast.Module
	own      []*ast.Module // of the sources, the shipped library left out
	data     ast.Object
	findings []Finding
	unparsed bool           // not every file parses
	standIns map[place]bool // where a rule is that another stands in for
}

func (c *compilation) report(loc *ast.Location, format string, args ...any) {
	f := Finding{File: c.src.Dir, Message: fmt.Sprintf(format, args...), Severity: SeverityError}
	if loc != nil {
		// An empty file has no place to point at.
		f.File, f.Line, f.Col = loc.File, max(loc.Row, 1), max(loc.Col, 1)
	}
	c.findings = append(c.findings, f)
}

func (c *compilation) reportAST(err error) {
	var list ast.Errors
	var one *ast.Error
	switch {
	case errors.As(err, &list):
		for _, e := range list {
			c.reportAST(e)
		}
	case errors.As(err, &one):
		message := one.Message
		if one.Details != nil && one.Code != ast.ParseErr {
			var lines []string
			for _, line := range one.Details.Lines() {
				// Some point into a copy of the reference, which was named.
				line = strings.Join(strings.Fields(line), " ")
				if line != "^" && !strings.HasSuffix(message, line) {
					lines = append(lines, line)
				}
			}
			message += " (" + strings.Join(lines, "; ") + ")"
		}
		c.report(one.Location, "%s", message)
	default:
		c.report(nil, "%s", err)
	}
}

// compile makes a program of sources, or says all that is wrong with them.
func compile(src Sources) (*program, []Finding) {
	c := &compilation{src: src}
	compiler := c.compile()
	if c.failed() {
		return nil, sortFindings(c.findings)
	}
	p := &program{compiler: compiler}
	if err := p.prepare(c); err != nil {
		c.reportAST(err)
		return nil, sortFindings(c.findings)
	}
	return p, sortFindings(c.findings)
}

// failed tells whether what was compiled must not decide anything. A rule that
// another stands in for was refused by name; should it ever not have been, it is
// here.
func (c *compilation) failed() bool {
	if len(c.standIns) > 0 && !hasErrors(c.findings) {
		c.report(nil, "it was not compiled as it is written, and nothing says why: a defect of the broker")
	}
	return hasErrors(c.findings)
}

func (c *compilation) compile() *ast.Compiler {
	unparsed := c.parse()
	c.parseData()
	schema, err := parseInputSchema()
	if err != nil {
		c.report(nil, "%s", err)
		return nil
	}
	set, err := schemaSet()
	if err != nil {
		c.report(nil, "%s", err)
		return nil
	}
	caps, forbidden := workerCapabilities(), forbiddenBuiltins()
	for _, m := range c.own {
		c.checkPackage(m)
		c.checkRules(m)
		if c.checkRefs(m, schema, forbidden) {
			// It was said; now the compiler has to know what it calls.
			caps.Builtins = ast.CapabilitiesForThisVersion().Builtins
		}
	}
	c.checkDefaults()
	c.own = append(c.own, unparsed...)
	for _, m := range unparsed {
		c.modules[m.Package.Loc().File] = m
	}
	for {
		compiler, whole := newCompiler(set, schema, caps, c.tests), false
		compiler.WithStageAfterID(ast.StageBuildRuleIndices, ast.CompilerStageDefinition{
			Name: "Whole", MetricName: "whole",
			Stage: func(*ast.Compiler) *ast.Error { whole = true; return nil },
		})
		compiler.Compile(c.modules)
		for _, e := range compiler.Errors {
			if !c.known(e) {
				c.reportAST(e)
			}
		}
		if whole {
			c.checkTypes(compiler)
			c.checkIndexes(compiler)
			c.checkComparisons(compiler)
			return compiler
		}
		if len(c.findings) < maxFindings && c.replaceFailed(compiler.Errors) {
			continue
		}
		if !hasErrors(c.findings) {
			c.reportAST(compiler.Errors)
		}
		return compiler
	}
}

// known tells whether an error of the compiler was said before: in the round
// before this, or of a reference, in better words; or it is of a helper that
// may be in a file that does not parse. That there are too many is nothing to
// say of a policy.
func (c *compilation) known(e *ast.Error) bool {
	if e.Location == nil {
		return e.Message == "error limit reached" && hasErrors(c.findings)
	}
	return c.standIns[placeOf(e.Location)] || c.unparsed && missingHelper.MatchString(e.Message) || slices.ContainsFunc(c.findings, func(f Finding) bool {
		if f.File != e.Location.File || f.Line != e.Location.Row {
			return false
		}
		const undefined = "undefined ref"
		return f.Col == e.Location.Col && strings.HasPrefix(f.Message, e.Message) ||
			strings.HasPrefix(f.Message, undefined) && strings.HasPrefix(e.Message, undefined)
	})
}

// missingHelper is what the compiler says of a helper that it does not find: a
// name with an underscore in front, or one of another package.
var missingHelper = regexp.MustCompile(`^(undefined function (_|data\.)|var _\w+ is unsafe|undefined ref: data\.)`)

func newCompiler(set *ast.SchemaSet, schema *inputSchema, caps *ast.Capabilities, tests bool) *ast.Compiler {
	return ast.NewCompiler().
		SetErrorLimit(maxFindings).
		WithCapabilities(caps).
		WithDefaultRegoVersion(ast.RegoV1).
		WithStrict(true).
		WithSchemas(set).
		WithStageAfterID(ast.StageResolveRefs, ast.CompilerStageDefinition{
			Name: "NarrowInput", MetricName: "narrow_input",
			Stage: func(compiler *ast.Compiler) *ast.Error {
				schema.narrow(compiler.TypeEnv.GetByRef(ast.InputRootRef))
				return nil
			},
		}).
		WithEnablePrintStatements(tests)
}

// parserOptions leave annotations alone: they may name schemas of their own.
var parserOptions = ast.ParserOptions{RegoVersion: ast.RegoV1}

// parse returns what stands in for the files that do not parse.
func (c *compilation) parse() (unparsed []*ast.Module) {
	c.modules, c.standIns = map[string]*ast.Module{}, map[place]bool{}
	lib, err := policies.Library()
	if err != nil {
		c.report(nil, "%s", err)
		return nil
	}
	for name, text := range lib {
		m, err := ast.ParseModuleWithOpts("spectrum/lib/"+name, string(text), parserOptions)
		if err != nil {
			c.reportAST(err)
			continue
		}
		c.modules["spectrum/lib/"+name] = m
	}
	names := make([]string, 0, len(c.src.Files))
	for name := range c.src.Files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if strings.HasSuffix(name, "_test.rego") && !c.tests {
			continue
		}
		file := c.src.display(name)
		m, err := ast.ParseModuleWithOpts(file, string(c.src.Files[name]), parserOptions)
		if err != nil {
			c.reportAST(err)
			c.unparsed = true
			if m := c.standInModule(file, c.src.Files[name]); m != nil {
				unparsed = append(unparsed, m)
			}
			continue
		}
		c.modules[file] = m
		c.own = append(c.own, m)
	}
	return unparsed
}

// parseData reads the sources' data document into data.partition.
func (c *compilation) parseData() {
	c.data = ast.NewObject()
	partition := ast.NewObject()
	if len(c.src.Data) > 0 {
		loc := &ast.Location{File: c.src.display(c.src.DataName), Row: 1, Col: 1}
		text := c.src.Data
		if !strings.HasSuffix(c.src.DataName, ".json") {
			var err error
			if text, err = yaml.YAMLToJSONStrict(text); err != nil {
				c.report(loc, "%s", err)
				return
			}
		}
		decoder := json.NewDecoder(bytes.NewReader(text))
		decoder.UseNumber()
		var doc map[string]any
		if err := decoder.Decode(&doc); err != nil {
			var syntax *json.SyntaxError
			if errors.As(err, &syntax) {
				loc.Row = 1 + bytes.Count(text[:syntax.Offset], []byte("\n"))
			}
			c.report(loc, "%s", err)
			return
		}
		if decoder.More() {
			c.report(loc, "more than one document")
			return
		}
		if _, ok := doc["lib"]; ok {
			c.report(loc, "the key \"lib\" is taken by packages partition.lib")
			return
		}
		value, err := ast.InterfaceToValue(doc)
		if err != nil {
			c.report(loc, "%s", err)
			return
		}
		if object, ok := value.(ast.Object); ok {
			partition = object
		}
	}
	c.data.Insert(ast.StringTerm("partition"), ast.NewTerm(partition))
}

// optionalAnswer marks a variable that holds an array of at most one answer.
const optionalAnswer = "optional_"

// prepare makes the one query that asks for all answers. Only rules that exist
// are asked for, and each by itself: asking for the whole package would also
// evaluate every helper.
func (p *program) prepare(c *compilation) error {
	v, err := ast.JSON(c.data)
	if err != nil {
		return err
	}
	object, ok := v.(map[string]any)
	if !ok {
		return errors.New("data is not an object")
	}
	p.store = inmem.NewFromObjectWithOpts(object, inmem.OptReturnASTValuesOnRead(true))
	txn, err := p.store.NewTransaction(context.Background())
	if err != nil {
		return err
	}
	p.txn = txn
	var parts []string
	for _, name := range answers {
		rules := p.compiler.GetRulesExact(grantPackage.Append(ast.StringTerm(name)))
		if len(rules) == 0 {
			continue
		}
		p.grant = append(p.grant, rules...)
		ref := "data.spectrum.grant." + name
		if rules[0].Head.RuleKind() == ast.MultiValue {
			parts = append(parts, name+" = "+ref) // always defined, if empty
		} else {
			// The comprehension keeps one undefined answer from hiding the others.
			parts = append(parts, fmt.Sprintf("%s%s = [x | x = %s]", optionalAnswer, name, ref))
		}
	}
	if len(parts) == 0 {
		return nil
	}
	body, err := ast.ParseBodyWithOpts(strings.Join(parts, "; "), parserOptions)
	if err != nil {
		return err
	}
	p.queryC = p.compiler.QueryCompiler().WithEnablePrintStatements(false)
	p.query, err = p.queryC.Compile(body)
	return err
}
