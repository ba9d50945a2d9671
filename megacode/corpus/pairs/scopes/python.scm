[(function_definition) (lambda)] @function
[(list_comprehension) (set_comprehension) (dictionary_comprehension) (generator_expression)] @block
(class_definition) @class

(function_definition return_type: (_) @outer)
(default_parameter value: (_) @outer)
(typed_parameter type: (_) @outer)
(typed_default_parameter type: (_) @outer value: (_) @outer)
(class_definition superclasses: (_) @outer)
(list_comprehension . body: (_) . (for_in_clause right: (_) @outer))
(set_comprehension . body: (_) . (for_in_clause right: (_) @outer))
(dictionary_comprehension . body: (_) . (for_in_clause right: (_) @outer))
(generator_expression . body: (_) . (for_in_clause right: (_) @outer))

(identifier) @word

(function_definition name: (identifier) @name)
(class_definition name: (identifier) @name)
(function_definition
  name: (identifier) @method
  parameters: (parameters . (identifier) @_first (#any-of? @_first "self" "cls" "mcs")))
(decorated_definition
  (decorator (identifier) @_decorator (#any-of? @_decorator "staticmethod" "classmethod"))
  definition: (function_definition name: (identifier) @method))

(function_definition type_parameters: (type_parameter (type [
  (identifier) @type
  (splat_type (identifier) @type)
  (constrained_type . (type (identifier) @type))
])))
(class_definition type_parameters: (_) @frozen)

(parameters [
  (identifier) @param
  (typed_parameter (identifier) @param)
  (_ name: (identifier) @param)
])
(lambda_parameters [(identifier) @param (_ name: (identifier) @param)])
(list_splat_pattern (identifier) @var)
(dictionary_splat_pattern (identifier) @var)
(assignment left: (identifier) @var)
(augmented_assignment left: (identifier) @var)
(for_statement left: (identifier) @var)
(for_in_clause left: (identifier) @var)
(pattern_list (identifier) @var)
(tuple_pattern (identifier) @var)
(list_pattern (identifier) @var)
(named_expression name: (identifier) @hoist)
(as_pattern_target (identifier) @var)
(as_pattern_target (tuple (identifier) @var))
(as_pattern_target (list (identifier) @var))
(as_pattern (case_pattern) (identifier) @var)
(case_pattern (dotted_name . (identifier) @var .))
(keyword_pattern (dotted_name . (identifier) @var .))
(splat_pattern (identifier) @var)

(attribute attribute: (identifier) @keep)
(dotted_name (identifier) (identifier) @keep)
(keyword_pattern (identifier) @keep)
(keyword_argument name: (identifier) @keyword)
(call function: (identifier) @splatted arguments: (argument_list (dictionary_splat)))

(global_statement (identifier) @fixed)
(import_statement name: (dotted_name . (identifier) @fixed))
(import_from_statement name: (dotted_name (identifier) @fixed))
(import_from_statement module_name: (dotted_name (identifier) @keep))
(relative_import (dotted_name (identifier) @keep))
(aliased_import name: (dotted_name (identifier) @keep) alias: (identifier) @fixed)
(interpolation "=") @frozen
(exec_statement) @unsafe
(wildcard_import) @unsafe
